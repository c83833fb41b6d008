"""SevenNet through torchcall, against SevenNet's own ASE calculator."""

import warnings

import jax
import numpy as np
import pytest
import torch
from parity import (
    FLOAT32,
    Tolerance,
    check_dynamics,
    check_second_derivatives,
    check_structures,
    evaluate,
    graph_of,
)
from structures import structures

from torchcall import models
from torchcall.mliap import energy_and_gradients, pad_graph

SYSTEMS = structures("Na", "Cl", 5.6)
ERRORS = (ValueError, jax.errors.JaxRuntimeError)
PRETRAINED = {"7net-0": None, "7net-l3i5": None, "7net-mf-0": "PBE"}


def calculator(name, modal=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sevenn.calculator import SevenNetCalculator

        return SevenNetCalculator(name, device="cpu", modal=modal)


@pytest.fixture(scope="module", params=["eager", "script", "package"])
def seven_net_0(request):
    return models.load("7net-0", engine=request.param)


def test_energies_forces_and_stresses_are_those_of_the_calculator(seven_net_0):
    check_structures(seven_net_0, calculator("7net-0"), SYSTEMS, FLOAT32)


@pytest.mark.parametrize("engine", ["eager", "script"])
@pytest.mark.parametrize("name", list(PRETRAINED)[1:])
def test_every_model_in_the_package(name, engine):
    modal = PRETRAINED[name]
    options = {} if modal is None else {"modal": modal}
    model = models.load(name, engine=engine, **options)
    # 7net-l3i5 in float32 differs by this much from float64, in its own calculator too.
    rounding = Tolerance(energy=3e-5, forces=3e-4, stress=1e-6)
    tolerance = rounding if name == "7net-l3i5" else FLOAT32
    check_structures(model, calculator(name, modal), SYSTEMS, tolerance)


def test_dynamics_are_those_of_ase(seven_net_0):
    check_dynamics(seven_net_0, calculator("7net-0"), SYSTEMS["bulk"], np.float32)


def test_edges_beyond_the_cutoff_change_nothing(seven_net_0):
    systems = [SYSTEMS["bulk"], SYSTEMS["molecule"]]
    results = [
        jax.jit(energy_and_gradients)(seven_net_0, graph_of(seven_net_0, systems, np.float32, skin))
        for skin in (0.0, 1.5)
    ]
    for name in ("energy", "position_gradients", "cell_gradients"):
        found, expected = (np.asarray(getattr(result, name)) for result in results)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    padded, _ = pad_graph(graph_of(seven_net_0, systems, np.float32), cutoff=seven_net_0.cutoff)
    for name, value in jax.jit(seven_net_0.call)(padded).items():
        assert np.isfinite(value).all(), name  # phantoms included


def test_an_unknown_element_is_an_error(seven_net_0):
    unknown = SYSTEMS["bulk"].copy()
    unknown.numbers[3] = 92 if 92 not in seven_net_0.species else 100
    with pytest.raises(ERRORS, match=f"got {unknown.numbers[3]} at entry 3"):
        evaluate(seven_net_0, [unknown], np.float32)


def test_a_deployed_model_and_a_module_are_recognised(tmp_path, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sevenn.scripts.deploy import deploy
        from sevenn.util import load_checkpoint, pretrained_name_to_path

        checkpoint = pretrained_name_to_path("7net-0")
        deploy(checkpoint, str(tmp_path / "deployed.pt"))
        network = load_checkpoint(checkpoint).build_model()
    expected = calculator("7net-0")
    batched = [getattr(layer, "_is_batch_data", None) for layer in network]
    for source in (tmp_path / "deployed.pt", network, checkpoint):
        model = models.load(source)
        assert "SevenNet" in capsys.readouterr().err
        check_structures(model, expected, {"bulk": SYSTEMS["bulk"]}, FLOAT32)
    assert [getattr(layer, "_is_batch_data", None) for layer in network] == batched
    with pytest.raises(TypeError, match="load the checkpoint"):
        models.load(tmp_path / "deployed.pt", engine="package")


def test_float64_arithmetic_agrees_with_float32():
    model = models.load("7net-0", engine="eager", dtype=torch.float64)
    check_structures(model, calculator("7net-0"), SYSTEMS, FLOAT32)


@pytest.mark.parametrize("engine", ["eager", "script"])
def test_second_derivatives(engine):
    """Against differences of our forces: SevenNet's calculator has float32 only."""
    with jax.enable_x64(True):
        model = models.load("7net-0", engine=engine, dtype=torch.float64)
        bulk = SYSTEMS["bulk"]

        def forces(positions):
            moved = bulk.copy()
            moved.positions = positions
            return evaluate(model, [moved], np.float64).forces

        check_second_derivatives(model, bulk, forces)


def test_wrong_modalities_and_names_are_errors():
    with pytest.raises(ValueError, match="expected one of 'R2SCAN', 'PBE', got None"):
        models.load("7net-mf-0")
    with pytest.raises(ValueError, match="one modality, got 'PBE'"):
        models.load("7net-0", modal="PBE")
    with pytest.raises(FileNotFoundError, match=r"expected a file or one of .*7net-0"):
        models.load("7net-1")
    with pytest.raises(FileNotFoundError, match=r"download https://github.com"):
        models.load("7net-mf-ompa")
