"""MACE dynamics of 64 silicon atoms through kUPS' own driver, against MACE's ASE calculator.

mace-torch has no trained models in its package: this is a random one, saved as MACE saves them.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase.build import bulk

import torchcall
from torchcall import models

kups_md = pytest.importorskip("kups.application.simulations.md", reason="make test-kups")
pytest.importorskip("mace", reason="make test-kups")
from kups.application.md.data import MdParameters, MdRunConfig  # noqa: E402
from kups.application.md.logging import MDLoggedData  # noqa: E402
from kups.application.potential.mliap.torch import make_torch_mliap_from_state  # noqa: E402
from kups.application.simulations.potentials import MaceConfig  # noqa: E402
from kups.core.storage import HDF5StorageReader  # noqa: E402
from kups.potential.mliap.torch import load_mace  # noqa: E402

from torchcall.integrations.kups import torch_mliap  # noqa: E402

# mace-torch, e3nn and kUPS use what torch, numpy and JAX have deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 20


@pytest.fixture(autouse=True)
def _settings():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a random MACE."""
    folder = tmp_path_factory.mktemp("mace")
    examples = Path(__file__).parents[2] / "examples"
    sys.path.insert(0, str(examples))
    try:
        from mace_adapter import random_mace
    finally:
        sys.path.remove(str(examples))
    torch.save(
        random_mace(for_compile=False, hidden="8x0e + 8x1o").double(), folder / "silicon.model"
    )
    return folder


@pytest.fixture
def calculator(folder):
    from mace.calculators import MACECalculator

    return MACECalculator(str(folder / "silicon.model"), device="cpu", default_dtype="float64")


def loaded_by_torchcall(path):
    return torch_mliap(models.load(path, kind="mace", dtype="float64", verbose=False))


def kups_adapter_in_torchcalls_wrapper(path):
    """kUPS' own module, which it would run on CUDA only."""
    model = load_mace(path, device="cpu", dtype="float64", compute_cell_gradients=True)

    def outputs(graph):
        n, b = graph["pos"].shape[0], graph["cell"].shape[0]
        shapes = {"energy": (b,), "position_gradients": (n, 3), "cell_gradients": (b, 3, 3)}
        return {name: jax.ShapeDtypeStruct(s, jnp.float64) for name, s in shapes.items()}

    wrapper = torchcall.TorchModuleWrapper(
        model.wrapper.module, requires_grad=True, output_spec=outputs
    )
    return dataclasses.replace(model, wrapper=wrapper)


class Potential(MaceConfig):
    """kUPS' configuration of MACE, with another loader."""

    loader: object

    def build(self, state_lens, gradient, **options):
        model = self.loader(self.model_path)
        potential = make_torch_mliap_from_state(
            state_lens, parameters=model, gradient=gradient, **options
        )
        return potential, model.cutoff


def frames(folder, loader, tmp_path):
    """Energies and atoms of each step of kUPS' driver."""
    out = tmp_path / "md.h5"
    atoms = bulk("Si", cubic=True) * (2, 2, 2)
    atoms.rattle(0.05, seed=0)
    # kUPS reads a file once, and donates its arrays to a run: another file for each run.
    atoms.write(tmp_path / "silicon.cif")
    config = kups_md.Config(
        run=MdRunConfig(out_file=out, num_steps=STEPS, num_warmup_steps=1, seed=1),
        md=MdParameters(
            temperature=300.0,
            time_step=1.0,
            friction_coefficient=0.01,
            thermostat_time_constant=100.0,
            target_pressure=1e5,
            pressure_coupling_time=1000.0,
            compressibility=1e-11,
            minimum_scale_factor=0.99,
            integrator="verlet",
            initialize_momenta=True,
        ),
        potential=Potential(model_path=folder / "silicon.model", device="cpu", loader=loader),
        inp_files=(tmp_path / "silicon.cif",),
    )
    kups_md.run(config)
    with HDF5StorageReader[MDLoggedData](out) as reader:
        return reader.focus_group(lambda logged: logged.step)[...]


@pytest.mark.parametrize("loader", [loaded_by_torchcall, kups_adapter_in_torchcalls_wrapper])
def test_energies_and_forces_of_kups_driver_are_ases(loader, folder, calculator, tmp_path):
    found = frames(folder, loader, tmp_path)
    atoms = bulk("Si", cubic=True) * (2, 2, 2)
    atoms.calc = calculator
    positions = np.asarray(found.atoms.data.positions)
    assert positions.shape == (STEPS, 64, 3)
    for step in (0, STEPS // 2, STEPS - 1):
        atoms.positions = positions[step]
        np.testing.assert_allclose(
            found.potential_energy[step, 0], atoms.get_potential_energy(), rtol=0, atol=1e-8
        )
        np.testing.assert_allclose(
            -found.atoms.data.position_gradients[step], atoms.get_forces(), rtol=0, atol=1e-8
        )
    total = np.asarray(found.potential_energy + found.kinetic_energy)[:, 0]
    kinetic = np.asarray(found.kinetic_energy)[:, 0]
    assert np.ptp(total) < 0.02 * np.ptp(kinetic)
    assert np.ptp(kinetic) > 0.01


def test_models_that_kups_cannot_use_are_one_line(folder):
    with pytest.raises(TypeError, match=r"expected a torchcall\.mliap\.TorchMliap, got a str"):
        torch_mliap("silicon.model")
    model = models.load(folder / "silicon.model", kind="mace", verbose=False)
    without = dataclasses.replace(model, compute_cell_gradients=False)
    with pytest.raises(ValueError, match="expected one with compute_cell_gradients=True"):
        torch_mliap(without)
