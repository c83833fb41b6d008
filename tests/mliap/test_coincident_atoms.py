"""Atoms at the same place, or so close that |r|² underflows, are neighbours like any others."""

from contextlib import nullcontext

import ase.neighborlist
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from ase import Atoms
from graphs import QUICK
from lists import assert_right, pairs
from reference import System, one_thread  # noqa: F401

from torchcall.mliap import (
    AtomGraph,
    TorchMliap,
    edges_from_pairs,
    energy_and_gradients,
    neighbor_list,
)
from torchcall.mliap._neighbors.native import use_jax

CUTOFF = 3.0


def coincident(dtype):
    """A crystal and a slab with many coincident atoms, also across faces; and four molecules: one
    with a coincident pair, one whose atoms all coincide, two with lengths whose square underflows.
    """
    generator = np.random.default_rng(0)
    short = [1e-19, 1e-44] if dtype is np.float32 else [1e-160, 1e-320]
    cells = np.zeros((6, 3, 3))
    cells[0] = [[4.0, 0, 0], [1.0, 3.5, 0], [0.5, -0.5, 4.5]]
    cells[1, :2] = [[3.0, 0, 0], [0.5, 4.0, 0]]
    pbc = cells.any(2)
    members = [np.array([[0, 0, 0], [0, 0, 0], [2, 0, 0]]), np.ones((20, 3))]
    members += [np.array([[0, 0, 0], [r, 0, 0], [0, -r, 0]]) for r in short]
    for cell, periodic in zip(cells[:2], pbc[:2], strict=True):
        own = np.round(generator.uniform(-2, 6, (6, 3)) * 256) / 256  # exact in single precision
        images = generator.integers(-2, 3, (6, 3)) * periodic
        members.append(np.concatenate([own, own + images @ cell, own[:2]]))
    members = members[4:] + members[:4]
    batch = np.repeat(np.arange(6), [len(x) for x in members])
    return np.concatenate(members).astype(dtype), cells.astype(dtype), pbc, batch


def ase_pairs(positions, cell, pbc, batch):
    found = set()
    for s in range(len(cell)):
        own = np.flatnonzero(batch == s)
        atoms = Atoms(["H"] * len(own), positions[own], cell=cell[s], pbc=pbc[s])
        i, j, shifts = ase.neighborlist.neighbor_list("ijS", atoms, CUTOFF)
        found |= set(zip(own[i].tolist(), own[j].tolist(), *shifts.T.tolist(), strict=True))
    return found


@pytest.mark.parametrize(
    "form, dtype",
    [
        ("custom calls", np.float32),
        ("custom calls", np.float64),
        pytest.param("JAX", np.float32, marks=pytest.mark.slow),
    ],
)
def test_all_pairs_are_listed_when_allocated_and_when_updated(form, dtype):
    """For the custom calls, which a CPU runs, and for the JAX stages of other devices."""
    with jax.enable_x64(dtype is np.float64), use_jax() if form == "JAX" else nullcontext():
        geometry = coincident(dtype)
        nbrs = neighbor_list(CUTOFF, skin=0.5, capacity_multiplier=2.0).allocate(*geometry)
        found, first = pairs(nbrs), np.searchsorted(geometry[3], 2)
        assert found == ase_pairs(*geometry)
        assert sum(i >= first for i, *_ in found) == 6 + 20 * 19 + 6 + 6
        assert sum(i < first and i != j for i, j, *_ in found) > 40
        assert_right(nbrs, *geometry, CUTOFF)
        update = jax.jit(lambda n, x: n.update(x, geometry[1]))
        # Some atoms separate and others meet, within the skin and beyond it.
        for step in (0.125, 1.0):
            moved = geometry[0].copy()
            moved[::3, 0] += dtype(step)
            moved[1] = moved[0]
            updated = update(nbrs, moved)
            assert_right(updated, moved, *geometry[1:], CUTOFF)
            assert (0, 1, 0, 0, 0) in pairs(updated)


def test_brute_force_reference_lists_coincident_atoms():
    x = np.array([[0, 0, 0], [0, 0, 0], [2, 0, 0.0]])
    system = System(x, np.ones(3, int), np.zeros((3, 3)), np.zeros(3, bool))
    i, j, shifts = reference.brute_force(system, CUTOFF, margin=0.0)
    expected = {(i, j, 0, 0, 0) for i in range(3) for j in range(3) if i != j}
    assert set(zip(i, j, *shifts.T, strict=True)) == expected


class Soft(torch.nn.Module):
    """½ Σ exp(−r²) over the directed edges: finite where atoms coincide."""

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos = input["pos"].detach().requires_grad_(True)
        i, j = input["edge_index"][0], input["edge_index"][1]
        shift = torch.bmm(
            input["cell_offsets"].unsqueeze(1), input["cell"][input["batch"][i]]
        ).squeeze(1)
        square = (pos[j] - pos[i] + shift).square().sum(1)
        each = 0.5 * torch.exp(-square) * (square < 9.0)
        energy = torch.zeros_like(input["charge"]).index_add(0, input["batch"][i], each)
        gradient = torch.autograd.grad([energy.sum()], [pos])[0]
        assert gradient is not None
        return {"energy": energy.detach(), "position_gradients": gradient}


class Singular(Soft):
    """½ Σ 1/r: infinite where atoms coincide."""

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos, i, j = input["pos"], input["edge_index"][0], input["edge_index"][1]
        shift = torch.bmm(
            input["cell_offsets"].unsqueeze(1), input["cell"][input["batch"][i]]
        ).squeeze(1)
        r = pos[j] - pos[i] + shift
        length = r.square().sum(1).sqrt()
        each = torch.where(length < 3.0, 0.5 / length, torch.zeros_like(length))
        energy = torch.zeros_like(input["charge"]).index_add(0, input["batch"][i], each)
        slope = (each / length.square()).unsqueeze(1) * r
        gradient = torch.zeros_like(pos).index_add(0, i, slope).index_add(0, j, -slope)
        return {"energy": energy, "position_gradients": gradient}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("source", ["neighbor list", "ASE's pairs"])
def test_every_pair_reaches_the_model(source):
    positions = np.array([[0, 0, 0], [0, 0, 0], [2, 0, 0]], np.float32)
    cell, pbc = np.zeros((1, 3, 3), np.float32), np.zeros((1, 3), bool)
    batch = np.zeros(3, np.int32)
    geometry = positions, cell, pbc, batch
    numbers = jnp.asarray(np.full(3, 1, np.int32))
    if source == "neighbor list":
        nbrs = neighbor_list(CUTOFF).allocate(*geometry)
        graph = AtomGraph.from_neighbors(nbrs, jnp.asarray(positions), jnp.asarray(cell), numbers)
    else:
        rows = np.array(sorted(ase_pairs(*geometry)))
        edges = edges_from_pairs(rows[:, 0], rows[:, 1], rows[:, 2:], n_atoms=3)
        graph = AtomGraph(
            *map(jnp.asarray, (positions, numbers, cell, pbc, batch)),
            edges.edge_index,
            edges.cell_offsets,
            edges.n_edges,
        )
    evaluate = jax.jit(energy_and_gradients, compiler_options=QUICK)
    out = evaluate(TorchMliap.from_module(torch.jit.script(Soft()), CUTOFF), graph)
    np.testing.assert_allclose(out.energy, [1 + 2 * np.exp(-4.0)], rtol=1e-6)
    assert np.isfinite(out.position_gradients).all()
    out = evaluate(TorchMliap.from_module(torch.jit.script(Singular()), CUTOFF), graph)
    assert not np.isfinite(out.energy).any()
    assert np.isnan(out.position_gradients[:2]).any()
