"""CHGNet through torchcall, against CHGNet's own ASE calculator."""

import contextlib
import io
import warnings

import ase
import ase.build
import jax
import numpy as np
import pytest
import torch
from parity import (
    FLOAT32,
    FLOAT64,
    check_dynamics,
    check_second_derivatives,
    check_structures,
    evaluate,
    forces_of,
    reference,
)
from structures import structures

from torchcall import models

pytestmark = [  # of CHGNet's calculator
    pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad"),
    pytest.mark.filterwarnings("ignore:No Pauling electronegativity"),
]
ERRORS = (ValueError, jax.errors.JaxRuntimeError)


def systems():
    found = structures("Na", "Cl", 5.6)
    # CHGNet's calculator needs a cell, also along open axes.
    found["molecule"].center(vacuum=8.0)
    return found


SYSTEMS = systems()


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def network(version="0.3.0"):
    from chgnet.model.model import CHGNet

    with quiet():
        return CHGNet.load(model_name=version, use_device="cpu", verbose=False)


def calculator(version="0.3.0", dtype=torch.float32):
    from chgnet.model.dynamics import CHGNetCalculator

    with quiet():
        return CHGNetCalculator(network(version).to(dtype), use_device="cpu")


@pytest.fixture
def float64_chgnet(monkeypatch):
    """CHGNet in float64: it names float32 in three places."""
    import chgnet.graph.converter
    import chgnet.model.model
    from chgnet.model.composition_model import AtomRef

    monkeypatch.setattr(chgnet.graph.converter, "TORCH_DTYPE", torch.float64)
    monkeypatch.setattr(chgnet.model.model, "TORCH_DTYPE", torch.float64)

    def composition(_, graphs):
        counts = [torch.bincount(g.atomic_number - 1, minlength=94).double() for g in graphs]
        return torch.stack([count / count.sum() for count in counts])

    monkeypatch.setattr(AtomRef, "_assemble_graphs", composition)


@pytest.fixture(scope="module", params=["eager", "script", "package"])
def chgnet_model(request):
    return models.load("chgnet", engine=request.param)


def test_energies_forces_and_stresses_are_those_of_the_calculator(chgnet_model):
    check_structures(chgnet_model, calculator(), SYSTEMS, FLOAT32)


def test_dynamics_are_those_of_ase(chgnet_model):
    check_dynamics(chgnet_model, calculator(), SYSTEMS["bulk"], np.float32)


def test_an_unknown_element_is_an_error(chgnet_model):
    unknown = SYSTEMS["bulk"].copy()
    unknown.numbers[3] = 95
    with pytest.raises(ERRORS, match="got 95 at entry 3"):
        evaluate(chgnet_model, [unknown], np.float32)


@pytest.mark.usefixtures("float64_chgnet")
@pytest.mark.parametrize(
    "version, engine",
    [("0.2.0", "script"), ("0.3.0", "eager"), ("0.3.0", "script"), ("r2scan", "script")],
)
def test_float64_results_are_those_of_the_calculator(version, engine):
    with jax.enable_x64(True):
        model = models.load(f"chgnet-{version}", engine=engine, dtype=torch.float64)
        check_structures(model, calculator(version, torch.float64), SYSTEMS, FLOAT64)


@pytest.mark.usefixtures("float64_chgnet")
@pytest.mark.parametrize("engine", ["eager", "script"])
def test_second_derivatives(engine):
    with jax.enable_x64(True):
        model = models.load("chgnet", engine=engine, dtype=torch.float64)
        forces = forces_of(calculator(dtype=torch.float64), SYSTEMS["bulk"])
        check_second_derivatives(model, SYSTEMS["bulk"], forces)


def test_atoms_without_bonds_and_without_neighbours(chgnet_model):
    box = {"cell": [20.0] * 3, "pbc": True}
    isolated = ase.Atoms("Ar", [[1.0, 1.0, 1.0]], **box)
    no_bonds = ase.Atoms("Ar2", [[1.0, 1.0, 1.0], [1.0, 1.0, 4.8]], **box)
    hydrogen = ase.Atoms("ArH2", [[1.0, 1.0, 1.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.8]], **box)
    found = {"isolated": isolated, "no bonds": no_bonds, "one isolated": hydrogen}
    check_structures(chgnet_model, calculator(), found, FLOAT32, stress=())


@pytest.mark.usefixtures("float64_chgnet")
def test_bonds_as_long_as_the_cutoff_of_bonds():
    """In this crystal each atom has six neighbours at exactly 3 Å, of which rounding decides."""
    crystal = ase.build.bulk("NaCl", "rocksalt", a=6.0, cubic=True)
    with jax.enable_x64(True):
        model = models.load("chgnet", engine="eager", dtype=torch.float64)
        own = reference(calculator(dtype=torch.float64), crystal)
        found = evaluate(model, [crystal], np.float64)
    np.testing.assert_allclose(found.energy, own.energy, rtol=1e-9)
    np.testing.assert_allclose(found.stress, own.stress, atol=1e-9)


def test_forces_in_float32_are_closer_to_float64_than_chgnet_s():
    """The cutoff polynomial as a product does not lose digits where many bonds are near 3 Å."""
    atoms = ase.build.bulk("LiO", "rocksalt", a=4.1, cubic=True)
    atoms.positions += np.random.default_rng(0).normal(scale=0.1, size=(8, 3))
    with jax.enable_x64(True):
        exact = evaluate(models.load("chgnet", dtype=torch.float64), [atoms], np.float64)
    own = reference(calculator(), atoms)
    found = evaluate(models.load("chgnet"), [atoms], np.float32)
    error, theirs = (abs(other.forces - exact.forces).max() for other in (found, own))
    assert error < 1e-5
    assert error < theirs


def test_a_checkpoint_and_a_module_are_recognised(tmp_path, capsys):
    for version in ("0.2.0", "0.3.0"):
        module = network(version)
        torch.save({"model": module.as_dict()}, tmp_path / "best.pth.tar")
        expected = calculator(version)
        for source in (tmp_path / "best.pth.tar", module):
            model = models.load(source, engine="eager")
            assert "CHGNet" in capsys.readouterr().err
            check_structures(model, expected, {"bulk": SYSTEMS["bulk"]}, FLOAT32)


def test_unsupported_options_and_files_are_errors(tmp_path):
    from chgnet.model.model import CHGNet

    with quiet():
        pooled, normed = CHGNet(mlp_first=False), CHGNet(conv_norm="layer")
    with pytest.raises(ValueError, match="mlp_first: expected the value of the pretrained"):
        models.load(pooled)
    with pytest.raises(ValueError, match=r"conv_norm: .*'layer'"):
        models.load(normed)
    with pytest.raises(FileNotFoundError, match="expected a file or one of"):
        models.load("chgnet-0.4.0")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pth.tar")
    with pytest.raises(ValueError, match="expected a checkpoint of CHGNet"):
        models.load(tmp_path / "other.pth.tar", kind="chgnet")
    with pytest.raises(TypeError, match=r"expected a chgnet\.model\.CHGNet"):
        models.load(torch.nn.Linear(1, 1), kind="chgnet")
