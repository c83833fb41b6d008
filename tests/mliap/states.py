"""States for tests, made from the reference systems."""

import dataclasses
from typing import Any, NamedTuple

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import reference

from torchcall.mliap import (
    EMPTY,
    Edges,
    Index,
    ParticleId,
    SystemId,
    Table,
    TorchMliap,
    empty_cache,
    lens,
    make_torch_mliap_potential,
)

SEEDS = (18, 10)
ATOMS = 8


def pytree(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class Atoms:
    positions: Any
    atomic_numbers: Any
    system: Any


@pytree
class Boxes:
    cell: Any
    pbc: Any


@pytree
class Charged:
    cell: Any
    pbc: Any
    charge: Any


class AtomsTuple(NamedTuple):
    positions: Any
    atomic_numbers: Any
    system: Any


class BoxesTuple(NamedTuple):
    cell: Any
    pbc: Any


@pytree
class State:
    particles: Any
    systems: Any
    neighborlist: Any
    torch_mliap_model: Any
    cache: Any = EMPTY

    def at(self, positions=None, cell=None):
        """The state with other positions or cells; the cache stays."""
        state = self
        if positions is not None:
            state = lens(lambda s: s.particles.data.positions).set(state, positions)
        if cell is not None:
            state = lens(lambda s: s.systems.data.cell).set(state, cell)
        return state


@pytree
class Fixed:
    """A neighbour list with constant edges."""

    edges: Edges

    def __call__(self, particles, systems, cutoffs):
        del particles, systems, cutoffs
        return self.edges


@pytree
class Move:
    """Displaces the atoms of accepted systems, by one vector per atom."""

    by: Any

    def __call__(self, state, accept):
        atoms = state.particles.data
        yes = accept[atoms.system]
        return state.at(jnp.where(yes[:, None], atoms.positions + self.by, atoms.positions))


def model(name="Stillinger-Weber", compute_cell_gradients=True):
    found = graphs.potential(name)
    return dataclasses.replace(found, compute_cell_gradients=compute_cell_gradients)


def members():
    return [reference.distorted(seed) for seed in SEEDS]


def order():
    """The permutation from the members' atoms, concatenated, to the state's atoms."""
    return np.random.default_rng(0).permutation(ATOMS * len(SEEDS))


def state(potential: TorchMliap, *, dtype=np.float64) -> State:
    """A state of shuffled atoms, in tables of dataclasses, with ASE's edges."""
    graph = graphs.atom_graph(members(), dtype=dtype, slots=5)
    to = order()
    n = len(to)
    places = np.append(np.argsort(to), n).astype(np.int32)
    edges = Edges(
        Index(tuple(map(ParticleId, range(n))), jnp.asarray(places)[graph.edge_index].T),
        graph.cell_offsets[:, None],
        graph.n_edges,
    )
    system = Index.integer(graph.batch[to], n=len(SEEDS), label=SystemId)
    return State(
        Table.arange(
            Atoms(graph.positions[to], graph.atomic_numbers[to], system), label=ParticleId
        ),
        Table.arange(Boxes(graph.cell, graph.pbc), label=SystemId),
        Fixed(edges),
        potential,
    )


def cached(potential: TorchMliap, **options):
    """A potential with a cache, and a state with an empty cache."""
    made = make_torch_mliap_potential(
        lambda s: s.particles,
        lambda s: s.systems,
        lambda s: s.neighborlist,
        lambda s: s.torch_mliap_model,
        lambda s: s.torch_mliap_model.cutoff,
        potential.compute_cell_gradients,
        out_cache_lens=lens(lambda s: s.cache),
        **options,
    )
    start = state(potential)
    return made, dataclasses.replace(start, cache=empty_cache(made, start))


def accept(*flags):
    return Table.arange(jnp.asarray(flags), label=SystemId)


def counted(potential: TorchMliap, function, *args):
    """The number of model calls of `function(*args)`, and its result."""
    before = potential.wrapper.stats()["calls"]
    result = jax.block_until_ready(function(*args))
    return potential.wrapper.stats()["calls"] - before, result


def same_bits(a, b):
    """Whether two pytrees have the same structure and bits."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)
