"""Charge and spin: from ASE, to models that look them up, with phantoms that stay in range."""

import ase.build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms
from graphs import QUICK
from reference import one_thread  # noqa: F401

from torchcall.mliap import (
    AtomGraph,
    TorchMliap,
    energy,
    geometry_from_ase,
    neighbor_list,
    pad_graph,
)

CUTOFF = 3.0


class ByMultiplicity(torch.nn.Module):
    """E = table[2S] + table[charge + 5]: an index out of range is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(10, 1)
        self.table.weight.data = torch.arange(10.0)[:, None]

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        spin = self.table((input["spin"] - 1).long()).squeeze(1)
        charge = self.table((input["charge"] + 5).long()).squeeze(1)
        gradients = torch.zeros_like(input["pos"])
        return {"energy": (spin + 10 * charge).detach(), "position_gradients": gradients}


def molecules():
    """Oxygen, a triplet by its moments; a radical cation and an anion by `info`."""
    oxygen = ase.build.molecule("O2")
    water, hydroxide = ase.build.molecule("H2O"), Atoms("OH", [[0, 0, 0], [0, 0, 0.97]])
    water.info.update(charge=1, spin=2)
    hydroxide.info["charge"] = -1
    return [oxygen, water, hydroxide]


@pytest.fixture
def graph():
    atoms = molecules()
    geometry = geometry_from_ase(atoms)
    positions, cell, _, _ = map(jnp.asarray, geometry)
    numbers = jnp.asarray(np.concatenate([a.numbers for a in atoms]).astype(np.int32))
    return AtomGraph.from_neighbors(
        neighbor_list(CUTOFF).allocate(*geometry),
        positions,
        cell,
        numbers,
        charge=jnp.asarray(geometry.charge),
        spin=jnp.asarray(geometry.spin),
    )


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_models_may_look_up_multiplicities(graph):
    model = TorchMliap.from_module(torch.jit.script(ByMultiplicity()), CUTOFF)
    expected = [2 + 50, 1 + 60, 0 + 40]
    evaluate = jax.jit(lambda graph: energy(model, graph), compiler_options=QUICK)
    np.testing.assert_array_equal(evaluate(graph), expected)
    stacked = jnp.stack([graph.spin, graph.spin + 1])
    mapped = jax.vmap(lambda s: energy(model, AtomGraph(**{**vars(graph), "spin": s})))(stacked)
    np.testing.assert_array_equal(mapped, [expected, np.add(expected, 1)])
    padded, masks = pad_graph(graph, cutoff=CUTOFF, n_systems=7)
    assert int(masks.systems.sum()) == 3
    np.testing.assert_array_equal(padded["spin"], [3, 2, 1, 3, 3, 3, 3])
    np.testing.assert_array_equal(padded["charge"], [0, 1, -1, 0, 0, 0, 0])


def test_charge_and_spin_of_ase_atoms():
    iron = ase.build.bulk("Fe", cubic=True)
    iron.set_initial_magnetic_moments([2.2, -2.2])
    canted = Atoms("NO", [[0, 0, 0], [0, 0, 1.15]])
    canted.set_initial_magnetic_moments([[0.6, 0.0, 0.0], [0.0, 0.8, 0.0]])
    salt = ase.build.bulk("NaCl", "rocksalt", a=5.6)
    salt.set_initial_charges([1.0, -0.5])
    salt.info["spin"] = 4
    found = geometry_from_ase([*molecules(), iron, canted, salt])
    np.testing.assert_array_equal(found.charge, np.float32([0, 1, -1, 0, 0, 0.5]))
    np.testing.assert_array_equal(found.spin, np.float32([3, 2, 1, 1, 2, 4]))
    assert found.charge.dtype == np.float32
    assert [len(array) for array in found] == [13, 6, 6, 13]
    none = geometry_from_ase([], dtype=np.float64)
    assert none.charge.shape == none.spin.shape == (0,)


@pytest.mark.parametrize("name", ["charge", "spin"])
@pytest.mark.parametrize("value", ["x", float("nan"), [1, 2]], ids=["text", "NaN", "a list"])
def test_an_invalid_charge_or_spin_is_an_error_that_names_it(name, value):
    atoms = ase.build.molecule("H2O")
    atoms.info[name] = value
    with pytest.raises(ValueError, match=rf"torchcall: atoms.info\['{name}'\]: expected a finite"):
        geometry_from_ase(atoms)
