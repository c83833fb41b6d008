"""kUPS' potential with torchcall's wrapper, and torchcall's potential with kUPS' tables."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchcall import mliap

# kUPS needs Python 3.12 and packages that torchcall's own environment lacks.
kups_data = pytest.importorskip("kups.core.data", reason="needs kUPS: make test-kups")
from kups.core.capacity import FixedCapacity  # noqa: E402
from kups.core.cell import PeriodicCell, TriclinicFrame  # noqa: E402
from kups.core.lens import lens  # noqa: E402
from kups.core.neighborlist import DenseNearestNeighborList, Edges  # noqa: E402
from kups.core.patch import ExplicitPatch, IdPatch  # noqa: E402
from kups.core.typing import ExclusionId, InclusionId, ParticleId, SystemId  # noqa: E402
from kups.core.utils.jax import dataclass  # noqa: E402
from kups.potential.common.graph import GraphPotentialInput, HyperGraph  # noqa: E402
from kups.potential.mliap.torch import interface  # noqa: E402

Index, Table = kups_data.Index, kups_data.Table


@dataclass
class Atoms:
    """Particles with kUPS' indices."""

    positions: jax.Array
    atomic_numbers: jax.Array
    system: Index
    inclusion: Index
    exclusion: Index


@dataclass
class Boxes:
    """Systems with kUPS' cell."""

    cell: PeriodicCell


@dataclass
class State:
    """A state of kUPS' tables."""

    particles: Table
    systems: Table
    edges: Edges
    cache: object


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def model():
    """Stillinger-Weber."""
    folder = Path(__file__).parents[2] / "examples"
    sys.path.insert(0, str(folder))
    try:
        from stillinger_weber import StillingerWeber
    finally:
        sys.path.remove(str(folder))
    module = StillingerWeber(cell_gradients=True)
    return mliap.TorchMliap.from_module(
        torch.jit.script(module.eval()), module.cutoff, compute_cell_gradients=True
    )


@pytest.fixture
def state(members, model):
    """kUPS' tables, with edges from torchcall's neighbour list."""
    positions, numbers, cells, batch = members
    order = np.argsort(batch, kind="stable")
    listed = mliap.neighbor_list(float(model.cutoff.data[0])).allocate(
        positions[order], cells, np.ones((2, 3), bool), batch[order].astype(np.int32)
    )
    n = int(listed.n_edges)
    pairs = order[np.asarray(listed.edge_index[:, :n]).T]
    edges = Edges(
        Index(tuple(map(ParticleId, range(16))), jnp.asarray(pairs)),
        jnp.asarray(listed.cell_offsets[:n, None]),
    )
    atoms = Atoms(
        jnp.asarray(positions),
        jnp.asarray(numbers),
        Index.integer(batch, n=2, label=SystemId),
        Index.integer(batch, n=2, label=InclusionId),
        Index.integer(np.arange(16), n=16, label=ExclusionId),
    )
    boxes = Boxes(PeriodicCell(TriclinicFrame.from_matrix(jnp.asarray(cells))))
    return State(
        Table.arange(atoms, label=ParticleId),
        Table.arange(boxes, label=SystemId),
        edges,
        mliap.EMPTY,
    )


def ours(model, **options):
    """torchcall's potential of a kUPS state; the list has a fixed cutoff, like kUPS' lists."""
    return mliap.make_torch_mliap_potential(
        lambda s: s.particles,
        lambda s: s.systems,
        lambda s: lambda keys, systems: s.edges,  # noqa: ARG005
        model,
        lambda _: model.cutoff,
        True,
        **options,
    )


def test_torchcalls_wrapper_works_in_kups_potential(state, model):
    kups_model = interface.TorchMliap(
        Table((SystemId(0),), model.cutoff.data), model.wrapper, compute_cell_gradients=True
    )
    graph = HyperGraph(state.particles, state.systems, state.edges)
    found = jax.jit(interface.torch_mliap_model_fn)(GraphPotentialInput(kups_model, graph)).data
    expected = ours(model)(state).data
    np.testing.assert_allclose(found.total_energies.data, expected.total_energies.data, rtol=1e-12)
    np.testing.assert_allclose(
        found.gradients.positions.data, expected.gradients.positions, rtol=0, atol=1e-10
    )
    # kUPS stores the six entries of its triangular frame.
    rows, columns = np.tril_indices(3)
    np.testing.assert_allclose(
        found.gradients.cell.data.frame.tril,
        np.asarray(expected.gradients.cell)[:, rows, columns],
        rtol=0,
        atol=1e-10,
    )


def test_torchcalls_potential_works_with_kups_neighbor_lists(state, model):
    cutoffs = Table((SystemId(0), SystemId(1)), jnp.full(2, model.cutoff.data[0]))
    listed = DenseNearestNeighborList(
        avg_candidates=FixedCapacity(16),
        avg_edges=FixedCapacity(40),
        avg_image_candidates=FixedCapacity(500),
        cutoffs=cutoffs,
    )
    potential = mliap.make_torch_mliap_potential(
        lambda s: s.particles, lambda s: s.systems, lambda _: listed, model, lambda _: cutoffs, True
    )
    found, expected = jax.jit(potential)(state).data, ours(model)(state).data
    np.testing.assert_allclose(found.total_energies.data, expected.total_energies.data, rtol=1e-12)
    np.testing.assert_allclose(
        found.gradients.positions, expected.gradients.positions, rtol=0, atol=1e-10
    )


def test_torchcalls_potential_works_with_kups_tables_patches_and_lenses(state, model):
    potential = ours(model, out_cache_lens=lens(lambda s: s.cache, cls=State))
    empty = mliap.empty_cache(potential, state)
    start = lens(lambda s: s.cache, cls=State).set(state, empty)

    def apply(state, by, accept):
        atoms = state.particles.data
        moved = jnp.where(accept[atoms.system][:, None], atoms.positions + by, atoms.positions)
        return lens(lambda s: s.particles.data.positions, cls=State).set(state, moved)

    move = ExplicitPatch(jnp.full((16, 3), 0.01) * jnp.arange(16)[:, None], apply)
    accept = state.systems.set_data(jnp.asarray([True, False]))
    result = jax.jit(potential)(start, move)
    after = result.patch(start, accept)
    batch = np.asarray(state.particles.data.system.indices)
    same = np.asarray(after.particles.data.positions == start.particles.data.positions).all(1)
    np.testing.assert_array_equal(same, (batch == 1) | (np.arange(16) == 0))
    np.testing.assert_array_equal(after.cache.known, [True, False])
    again = jax.jit(potential)(after, IdPatch()).data
    assert again.total_energies.data[0] == result.data.total_energies.data[0]
