"""MACE through torchcall, against MACE's own ASE calculator.

mace-torch has no trained models in its package: these are random ones, saved as MACE saves them.
"""

import os
import warnings

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
)
from structures import structures

from torchcall import models
from torchcall.models import mace as loader

# mace-torch and e3nn use what torch and numpy have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

SYSTEMS = structures("Si", "O", 4.2)
HEADS = ["dft", "default"]
CLASSES = ["MACE", "ScaleShiftMACE"]


def network(name, heads=HEADS, seed=0):
    """A random model for four elements."""
    with loader._imports():
        import mace  # noqa: F401  first: it lets e3nn load its constants
        from e3nn import o3
        from mace import modules

        interaction = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        numbers = [1, 6, 8, 14]
        options = {
            "r_max": 4.0,
            "num_bessel": 8,
            "num_polynomial_cutoff": 5,
            "max_ell": 2,
            "interaction_cls": interaction,
            "interaction_cls_first": interaction,
            "num_interactions": 2,
            "num_elements": len(numbers),
            "hidden_irreps": o3.Irreps("8x0e + 8x1o"),
            "MLP_irreps": o3.Irreps("8x0e"),
            "atomic_energies": np.random.default_rng(seed).normal(size=(len(heads), len(numbers))),
            "avg_num_neighbors": 20.0,
            "atomic_numbers": numbers,
            "correlation": 2,
            "gate": torch.nn.functional.silu,
            "heads": heads,
        }
        if name == "ScaleShiftMACE":
            options["atomic_inter_scale"] = [0.8 + 0.1 * i for i in range(len(heads))]
            options["atomic_inter_shift"] = [0.1 * i for i in range(len(heads))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return getattr(modules, name)(**options).eval()


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mace")
    for name in CLASSES:
        torch.save(network(name), folder / f"{name}.model")
    return folder


def calculator(path, dtype, head):
    with loader._imports():
        from mace.calculators import MACECalculator

        # Given a path, it needs the environment variable that mace sets and `_imports` restores.
        model = torch.load(path, weights_only=False)
        return MACECalculator(models=[model], default_dtype=dtype, head=head)


@pytest.mark.parametrize("engine", ["eager", "script"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CLASSES)
def test_results_equal_those_of_maces_calculator(files, name, dtype, engine):
    tolerance = FLOAT64 if dtype == "float64" else FLOAT32
    with jax.enable_x64(dtype == "float64"):
        model = models.load(files / f"{name}.model", head="dft", dtype=dtype, engine=engine)
        expected = calculator(files / f"{name}.model", dtype, "dft")
        check_structures(model, expected, SYSTEMS, tolerance)


@pytest.mark.parametrize("engine", ["eager", "script"])
def test_second_derivatives(files, engine):
    path = files / "ScaleShiftMACE.model"
    with jax.enable_x64(True):
        model = models.load(path, head="dft", dtype="float64", engine=engine)
        forces = forces_of(calculator(path, "float64", "dft"), SYSTEMS["bulk"])
        check_second_derivatives(model, SYSTEMS["bulk"], forces)


def test_a_float64_package_with_second_derivatives(files):
    path = files / "ScaleShiftMACE.model"
    options = {"dtype": "float64", "engine": "package", "second_derivatives": True}
    with jax.enable_x64(True):
        model = models.load(path, head="dft", **options)
        expected = calculator(path, "float64", "dft")
        check_structures(model, expected, SYSTEMS, FLOAT64)
        forces = forces_of(expected, SYSTEMS["bulk"])
        check_second_derivatives(model, SYSTEMS["bulk"], forces)


@pytest.mark.parametrize("name", CLASSES)
def test_the_rebuilt_model_has_the_same_energies_and_no_torchscript(files, name):
    model = torch.load(files / f"{name}.model", weights_only=False)
    built = loader.prepared(model)
    assert not any(isinstance(part, torch.jit.ScriptModule) for part in built.modules())
    assert loader._agree(model, built)
    weight = next(p for n, p in built.named_parameters() if n.startswith("readouts"))
    weight.data *= 1.01
    assert not loader._agree(model, built)


@pytest.mark.parametrize("name", CLASSES)
def test_packages_equal_maces_calculator(files, name):
    model = models.load(files / f"{name}.model", head="dft", engine="package")
    expected = calculator(files / f"{name}.model", "float32", "dft")
    check_structures(model, expected, SYSTEMS, FLOAT32)


@pytest.mark.parametrize(
    "engine, dtype",
    [("eager", "float32"), ("script", "float32"), ("script", "float64"), ("package", "float32")],
)
def test_dynamics_equal_those_of_ase(files, engine, dtype):
    with jax.enable_x64(dtype == "float64"):
        path = files / "ScaleShiftMACE.model"
        model = models.load(path, head="dft", dtype=dtype, engine=engine)
        expected = calculator(path, dtype, "dft")
        check_dynamics(model, expected, SYSTEMS["bulk"], np.dtype(dtype).type)


def test_heads_are_selected_by_name_and_listed_in_errors(files):
    path = files / "ScaleShiftMACE.model"
    energies = [
        evaluate(loader.load(path, head=head, verbose=False), [SYSTEMS["bulk"]], np.float32).energy
        for head in ("dft", "default", None)
    ]
    assert energies[1] == energies[2]
    assert abs(energies[0] - energies[1]) > 0.1
    with pytest.raises(ValueError, match=r"head: expected one of 'dft', 'default', got 'mp'"):
        loader.load(path, head="mp")


def test_scripted_files_of_mace_load(files, tmp_path):
    from e3nn.util import jit

    with loader._imports():
        from mace.calculators import LAMMPS_MACE

    model = torch.load(files / "ScaleShiftMACE.model", weights_only=False)
    expected = evaluate(loader.load(model, head="dft"), [SYSTEMS["bulk"]], np.float32)
    for file, made in (("a_compiled.model", model), ("a.pt", LAMMPS_MACE(model, head="dft"))):
        jit.compile(made).save(str(tmp_path / file))
        assert loader.recognises(tmp_path / file)
        head = "dft" if file == "a_compiled.model" else None
        found = evaluate(loader.load(tmp_path / file, head=head), [SYSTEMS["bulk"]], np.float32)
        np.testing.assert_allclose(found.energy, expected.energy, rtol=1e-6)
    with pytest.raises(TypeError, match=r"load the \.model file"):
        loader.load(tmp_path / "a_compiled.model", head="dft", engine="package")


def test_unknown_elements_are_errors_that_name_them(files):
    wrong = SYSTEMS["bulk"].copy()
    wrong.numbers[0] = 79
    for engine in ("eager", "script", "package"):
        model = models.load(files / "ScaleShiftMACE.model", head="dft", engine=engine)
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="got 79 at entry 0"):
            evaluate(model, [wrong], np.float32)


def test_weights_without_a_model_are_refused(tmp_path):
    torch.save(network("MACE").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(TypeError, match=r"expected a model, as MACE's training writes"):
        loader.load(tmp_path / "weights.pt")


@pytest.mark.parametrize("engine", ["eager", "script"])
def test_loading_warns_of_nothing(files, engine):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        models.load(files / "ScaleShiftMACE.model", head="dft", engine=engine)


def test_loading_restores_the_environment_and_the_default_dtype(files):
    loader.load(files / "MACE.model", engine="eager")
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
    assert torch.get_default_dtype() == torch.float32
