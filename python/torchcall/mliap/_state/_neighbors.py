"""Edges of a state from a `NeighborList` or another callable."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from torchcall.mliap._neighbors.neighbor_list import NeighborList
from torchcall.mliap._state._graph import (
    Edges,
    Rows,
    cells_of,
    compact,
    particle_rows,
    raise_if_concrete,
    required,
    system_rows,
)
from torchcall.mliap._table import Index, rows_of


def list_edges(neighbors: NeighborList, particles: Any, systems: Any, cutoffs: Any) -> Edges:
    """Implements `NeighborList.__call__`."""
    atoms, boxes = particle_rows(particles), system_rows(systems)
    positions = jnp.asarray(atoms.data.positions)
    cell, pbc = cells_of(boxes)
    system = rows_of(required(atoms.data, "system", "particles"), boxes.keys, "particles.system")
    if system.shape != neighbors.batch.shape or cell.shape != neighbors.cell.shape:
        raise ValueError(
            "torchcall: neighborlist: expected the numbers of atoms and systems that it was "
            f"allocated for, {neighbors.batch.shape[0]} and {neighbors.cell.shape[0]}, "
            f"got {system.shape[0]} and {cell.shape[0]}"
        )
    values: Array | None = cutoffs_of(cutoffs, boxes, "cutoffs").astype(positions.dtype)
    listed = neighbors.layout.cutoff
    if not isinstance(values, Tracer) and np.allclose(values, listed, rtol=1e-6, atol=0):
        values = None
    cell, system = cell.astype(neighbors.cell.dtype), system.astype(jnp.int32)
    found = _find_edges(neighbors, *lax.stop_gradient((positions, cell)), pbc, system, values)
    raise_if_concrete(
        found.systems_differ,
        "neighborlist",
        "as many atoms in each system, and the periodicity, as it was allocated for",
        f"pbc {pbc}, systems {system}",
    )
    raise_if_concrete(
        found.cutoff_exceeded,
        "neighborlist",
        f"cutoffs of at most the list's own, {listed:g} Å",
        getattr(cutoffs, "data", cutoffs),
    )
    flag = found.did_overflow | found.systems_differ | found.cutoff_exceeded
    return Edges(Index(atoms.keys, found.edge_index.T), found.offsets[:, None], found.n_edges, flag)


class _FoundEdges(NamedTuple):
    """Edges between the caller's atoms, with error flags."""

    edge_index: Array
    offsets: Array
    n_edges: Array
    did_overflow: Array
    systems_differ: Array
    cutoff_exceeded: Array


@jax.jit
def _find_edges(
    neighbors: NeighborList,
    positions: Array,
    cell: Array,
    pbc: Array,
    system: Array,
    cutoffs: Array | None,
) -> _FoundEdges:
    n = system.shape[0]
    row = lax.iota(jnp.int32, n)
    as_allocated = jnp.all(system == neighbors.batch)
    order = lax.cond(as_allocated, lambda: row, lambda: lax.sort((system, row), num_keys=2)[1])
    # System sizes and periodicity are fixed at allocation.
    differ = jnp.any(system[order] != neighbors.batch) | jnp.any(pbc != neighbors.pbc)
    index, offsets, n_edges, overflow = _updated(neighbors, positions[order], cell)
    rows = jnp.append(order, jnp.int32(n))
    edges = (lax.cond(as_allocated, lambda: index, lambda: rows[index]), offsets, n_edges)
    exceeded = jnp.zeros((), bool)
    if cutoffs is not None:
        listed = neighbors.layout.cutoff
        # Negated, so that NaN counts as exceeded.
        exceeded = ~jnp.all(cutoffs <= listed * (1 + 1e-6))
        if n:
            edges = lax.cond(
                jnp.any(cutoffs < listed * (1 - 1e-6)),
                lambda: _within(edges, positions, cell, system, cutoffs),
                lambda: edges,
            )
    return _FoundEdges(edges[0], edges[1], edges[2], overflow, differ, exceeded)


def _updated(
    neighbors: NeighborList, positions: Array, cell: Array
) -> tuple[Array, Array, Array, Array]:
    def update() -> tuple[Array, Array, Array, Array]:
        new = neighbors.update(positions, cell)
        return new.edge_index, new.cell_offsets, new.n_edges, new.did_overflow

    def update_if_moved() -> tuple[Array, Array, Array, Array]:
        same = jnp.all(positions == neighbors.positions) & jnp.all(cell == neighbors.cell)
        old = (neighbors.edge_index, neighbors.cell_offsets, neighbors.n_edges)
        return lax.cond(
            same & (neighbors.problems == 0), lambda: (*old, neighbors.did_overflow), update
        )

    # On a GPU, a condition would synchronise with the host.
    return lax.platform_dependent(cpu=update_if_moved, default=update)


def cutoffs_of(cutoffs: Any, systems: Rows, name: str) -> Float[Array, " b"]:
    """The cutoff of each system in Å, from a table with one entry per system or one for all.

    Raises:
        TypeError: it is not a table.
        ValueError: its shape is wrong, or a system has no entry.
    """
    if not (hasattr(cutoffs, "keys") and hasattr(cutoffs, "data")):
        raise TypeError(
            f"torchcall: {name}: expected a table by system, got {type(cutoffs).__name__}"
        )
    values, b = jnp.asarray(cutoffs.data), len(systems.keys)
    if values.shape != (len(cutoffs.keys),):
        raise ValueError(
            f"torchcall: {name}: expected shape {(len(cutoffs.keys),)}, got {values.shape}"
        )
    if len(cutoffs.keys) == 1:
        return jnp.broadcast_to(values, (b,))
    return values[rows_of(Index(systems.keys, jnp.arange(b)), tuple(cutoffs.keys), name)]


def _within(
    edges: tuple[Array, Array, Array], positions: Array, cell: Array, system: Array, cutoffs: Array
) -> tuple[Array, Array, Array]:
    """The edges shorter than their system's cutoff."""
    index, offsets, n_edges = edges
    n = positions.shape[0]
    used = (lax.iota(jnp.int32, index.shape[1]) < n_edges) & jnp.all(index < n, axis=0)
    i, j = jnp.where(used, index, 0)
    shift = jnp.einsum("ek,ekl->el", offsets, cell[system[i]], precision="highest")
    r = jnp.linalg.norm(positions[j] - positions[i] + shift, axis=-1)
    return compact(index, offsets, used & (r < cutoffs[system[i]]))


def call_neighborlist(
    neighborlist: Callable[..., Any], particles: Any, systems: Any, cutoffs: Any
) -> Any:
    """Edges from `(particles, systems, cutoffs) → Edges`, or `(particles, systems) → Edges`.

    Raises:
        TypeError: it is not callable.
    """
    if not callable(neighborlist):
        raise TypeError(
            "torchcall: neighborlist: expected a callable (particles, systems, cutoffs) → Edges, "
            f"got {type(neighborlist).__name__}"
        )
    try:
        inspect.signature(neighborlist).bind(particles, systems, cutoffs)
    except TypeError:
        # A list with a fixed cutoff.
        return neighborlist(particles, systems)
    except ValueError:  # it has no signature
        pass
    return neighborlist(particles, systems, cutoffs)
