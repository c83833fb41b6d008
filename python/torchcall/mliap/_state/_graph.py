"""Particles, systems and edges of a state, and their conversion to an `AtomGraph`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from torchcall.mliap._edges import Edges, compact
from torchcall.mliap._graph import AtomGraph, check_graph
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._rows import cells_of, particle_rows, required, system_rows
from torchcall.mliap._table import ParticleId, SystemId, Table, rows_of

P = TypeVar("P")
S = TypeVar("S")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["particles", "systems", "edges"],
    meta_fields=[],
)
@dataclass(frozen=True)
class HyperGraph(Generic[P, S]):
    """Atoms in any order, their systems and edges; a pytree.

    Attributes:
        particles: table of `IsTorchMliapParticles`, or such an object itself.
        systems: table of `HasCell`, or such an object itself.
        edges: `Edges`, or anything with `indices` and `shifts`.
    """

    particles: Table[ParticleId, P]
    systems: Table[SystemId, S]
    edges: Edges


class TorchMliapInput(NamedTuple, Generic[P, S]):
    """The input of `torch_mliap_model_fn`.

    Attributes:
        parameters: the potential.
        graph: atoms, systems and edges.
    """

    parameters: TorchMliap
    graph: HyperGraph[P, S]


def atom_graph(graph: HyperGraph[Any, Any]) -> AtomGraph:
    """The arrays of a graph, valid edges first, floats in the positions' dtype.

    Raises:
        TypeError: an attribute is missing, or a dtype is wrong.
        ValueError: a shape is wrong, or an index has keys that its table lacks.
    """
    particles, systems = particle_rows(graph.particles), system_rows(graph.systems)
    positions = jnp.asarray(particles.data.positions)
    numbers = jnp.asarray(required(particles.data, "atomic_numbers", "particles"))
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise TypeError(
            f"torchcall: particles.atomic_numbers: expected integers, got {numbers.dtype}"
        )
    system = required(particles.data, "system", "particles")
    batch = rows_of(system, systems.keys, "particles.system").astype(jnp.int32)
    cell, pbc = cells_of(systems)
    index, offsets, n_edges = _edge_arrays(graph.edges, particles.keys, batch, len(systems.keys))
    # A list that did overflow counts the edges that it has no room for.
    slots = index.shape[1]
    found = AtomGraph(
        positions=positions,
        atomic_numbers=numbers,
        cell=cell.astype(positions.dtype),
        pbc=pbc,
        batch=batch,
        edge_index=index,
        cell_offsets=offsets,
        n_edges=jnp.clip(n_edges, 0, slots),
        charge=_optional(systems.data, "charge", positions.dtype),
        spin=_optional(systems.data, "spin", positions.dtype),
        did_overflow=(n_edges < 0) | (n_edges > slots),
    )
    check_graph(found)
    return found


def _optional(systems: Any, name: str, dtype: Any) -> Array | None:
    value = getattr(systems, name, None)
    return None if value is None else jnp.asarray(value).astype(dtype)


def _edge_arrays(
    edges: Any, keys: tuple[Any, ...], batch: Array, n_systems: int
) -> tuple[Array, Array, Array]:
    indices = required(edges, "indices", "edges")
    shifts = jnp.asarray(required(edges, "shifts", "edges"))
    pairs = rows_of(indices, keys, "edges.indices")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"torchcall: edges.indices: expected shape ({pairs.shape[0] if pairs.ndim else 'e'}, 2)"
            f", got {pairs.shape}"
        )
    e = pairs.shape[0]
    if shifts.shape != (e, 1, 3):
        raise ValueError(f"torchcall: edges.shifts: expected shape {(e, 1, 3)}, got {shifts.shape}")
    index, offsets = pairs.T.astype(jnp.int32), shifts.reshape(e, 3)
    n_edges = getattr(edges, "n_edges", None)
    if n_edges is not None:
        return index, offsets, jnp.asarray(n_edges, jnp.int32)
    # An index out of range reads the appended entry: no system.
    system = jnp.append(batch, jnp.int32(n_systems))[index]
    return compact(index, offsets, jnp.all(system < n_systems, axis=0))
