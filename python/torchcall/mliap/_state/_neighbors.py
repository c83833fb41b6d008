"""A `NeighborList` as the callable that lists the edges of a state."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float

from .._neighbors import NeighborList
from .._table import Index, rows_of
from ._graph import (
    Edges,
    Rows,
    cells_of,
    compact,
    particle_rows,
    refuse_known,
    required,
    system_rows,
)


def list_edges(neighbors: NeighborList, particles: Any, systems: Any, cutoffs: Any) -> Edges:
    """`NeighborList.__call__`, which see."""
    atoms, boxes = particle_rows(particles), system_rows(systems)
    positions = lax.stop_gradient(jnp.asarray(atoms.data.positions))
    cell, pbc = cells_of(boxes)
    cell = lax.stop_gradient(cell).astype(neighbors.cell.dtype)
    system = rows_of(required(atoms.data, "system", "particles"), boxes.keys, "particles.system")
    system = system.astype(jnp.int32)
    if system.shape != neighbors.batch.shape or cell.shape != neighbors.cell.shape:
        raise ValueError(
            "torchcall: neighborlist: expected the numbers of atoms and systems that it was "
            f"allocated for, {neighbors.batch.shape[0]} and {neighbors.cell.shape[0]}, "
            f"got {system.shape[0]} and {cell.shape[0]}"
        )
    n = system.shape[0]
    row = lax.iota(jnp.int32, n)
    as_allocated = jnp.all(system == neighbors.batch)
    order = lax.cond(as_allocated, lambda: row, lambda: lax.sort((system, row), num_keys=2)[1])
    # A list knows its systems' sizes and periodicity from its allocation.
    wrong = jnp.any(system[order] != neighbors.batch) | jnp.any(pbc != neighbors.pbc)
    index, offsets, n_edges, overflow = _listed(neighbors, positions[order], cell)
    places = jnp.append(order, jnp.int32(n))
    index = lax.cond(as_allocated, lambda: index, lambda: places[index])
    index, offsets, n_edges, short = _within(
        neighbors,
        (index, offsets, n_edges),
        cutoffs_of(cutoffs, boxes, "cutoffs"),
        positions,
        cell,
        system,
    )
    flag = overflow | short | wrong
    refuse_known(
        wrong,
        "neighborlist",
        "as many atoms in each system, and the periodicity, as it was allocated for",
        f"pbc {pbc}, systems {system}",
    )
    return Edges(Index(atoms.keys, index.T), offsets[:, None], n_edges, flag)


def _listed(
    neighbors: NeighborList, positions: Array, cell: Array
) -> tuple[Array, Array, Array, Array]:
    def update() -> tuple[Array, Array, Array, Array]:
        new = neighbors.update(positions, cell)
        return new.edge_index, new.cell_offsets, new.n_edges, new.did_overflow

    def update_if_moved() -> tuple[Array, Array, Array, Array]:
        stays = jnp.all(positions == neighbors.positions) & jnp.all(cell == neighbors.cell)
        old = (neighbors.edge_index, neighbors.cell_offsets, neighbors.n_edges)
        return lax.cond(
            stays & (neighbors.problems == 0), lambda: (*old, neighbors.did_overflow), update
        )

    # Elsewhere a condition would make the device wait for the host.
    return lax.platform_dependent(cpu=update_if_moved, default=update)


def cutoffs_of(cutoffs: Any, systems: Rows, name: str) -> Float[Array, " b"]:
    """Cutoff of each system in Å, from a table of which one entry serves all.

    Raises:
        TypeError: it is no table.
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
    neighbors: NeighborList,
    edges: tuple[Array, Array, Array],
    cutoffs: Array,
    positions: Array,
    cell: Array,
    system: Array,
) -> tuple[Array, Array, Array, Array]:
    """Edges within their systems' own cutoffs, and whether the list is too short for one."""
    listed = neighbors.layout.cutoff
    cutoffs = lax.stop_gradient(cutoffs).astype(positions.dtype)
    short = jnp.any(~(cutoffs <= listed * (1 + 1e-6)))
    refuse_known(short, "neighborlist", f"cutoffs of at most the list's own, {listed:g} Å", cutoffs)

    def drop() -> tuple[Array, Array, Array]:
        index, offsets, n_edges = edges
        n = positions.shape[0]
        used = (lax.iota(jnp.int32, index.shape[1]) < n_edges) & jnp.all(index < n, axis=0)
        i, j = jnp.where(used, index, 0) if n else index
        shift = jnp.einsum("ek,ekl->el", offsets, cell[system[i]], precision="highest")
        r = jnp.linalg.norm(positions[j] - positions[i] + shift, axis=-1)
        return compact(index, offsets, used & (r < cutoffs[system[i]]))

    if not isinstance(cutoffs, Tracer) and np.allclose(cutoffs, listed, rtol=1e-6, atol=0):
        return *edges, short
    if positions.shape[0] == 0:
        return *edges, short
    longer = jnp.any(cutoffs < listed * (1 - 1e-6))
    return *lax.cond(longer, drop, lambda: edges), short


def call_neighborlist(
    listing: Callable[..., Any], particles: Any, systems: Any, cutoffs: Any
) -> Any:
    """Edges from `(particles, systems, cutoffs) → Edges`, or from a callable of the first two.

    Raises:
        TypeError: it is no callable.
    """
    if not callable(listing):
        raise TypeError(
            "torchcall: neighborlist: expected a callable (particles, systems, cutoffs) → Edges, "
            f"got {type(listing).__name__}"
        )
    try:
        inspect.signature(listing).bind(particles, systems, cutoffs)
    except TypeError:
        # Lists that are bound to a cutoff.
        return listing(particles, systems)
    except ValueError:  # no signature to be had
        pass
    return listing(particles, systems, cutoffs)
