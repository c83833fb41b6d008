"""A `NeighborList` as the callable that lists the edges of a state."""

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
    refuse_known,
    required,
    system_rows,
)
from torchcall.mliap._table import Index, rows_of


def list_edges(neighbors: NeighborList, particles: Any, systems: Any, cutoffs: Any) -> Edges:
    """`NeighborList.__call__`, which see."""
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
    reach: Array | None = cutoffs_of(cutoffs, boxes, "cutoffs").astype(positions.dtype)
    listed = neighbors.layout.cutoff
    if not isinstance(reach, Tracer) and np.allclose(reach, listed, rtol=1e-6, atol=0):
        reach = None
    cell, system = cell.astype(neighbors.cell.dtype), system.astype(jnp.int32)
    drawn = _draw(neighbors, *lax.stop_gradient((positions, cell)), pbc, system, reach)
    refuse_known(
        drawn.other_systems,
        "neighborlist",
        "as many atoms in each system, and the periodicity, as it was allocated for",
        f"pbc {pbc}, systems {system}",
    )
    refuse_known(
        drawn.too_short,
        "neighborlist",
        f"cutoffs of at most the list's own, {listed:g} Å",
        getattr(cutoffs, "data", cutoffs),
    )
    flag = drawn.did_overflow | drawn.other_systems | drawn.too_short
    return Edges(Index(atoms.keys, drawn.edge_index.T), drawn.offsets[:, None], drawn.n_edges, flag)


class _Drawn(NamedTuple):
    """Edges between the caller's atoms, and what is wrong with them."""

    edge_index: Array
    offsets: Array
    n_edges: Array
    did_overflow: Array
    other_systems: Array
    too_short: Array


@jax.jit
def _draw(
    neighbors: NeighborList,
    positions: Array,
    cell: Array,
    pbc: Array,
    system: Array,
    reach: Array | None,
) -> _Drawn:
    n = system.shape[0]
    row = lax.iota(jnp.int32, n)
    as_allocated = jnp.all(system == neighbors.batch)
    order = lax.cond(as_allocated, lambda: row, lambda: lax.sort((system, row), num_keys=2)[1])
    # A list knows its systems' sizes and periodicity from its allocation.
    other = jnp.any(system[order] != neighbors.batch) | jnp.any(pbc != neighbors.pbc)
    index, offsets, n_edges, overflow = _listed(neighbors, positions[order], cell)
    places = jnp.append(order, jnp.int32(n))
    edges = (lax.cond(as_allocated, lambda: index, lambda: places[index]), offsets, n_edges)
    if reach is None:
        too_short = jnp.zeros((), bool)
        return _Drawn(edges[0], edges[1], edges[2], overflow, other, too_short)
    listed = neighbors.layout.cutoff
    # Not "longer than": a NaN has to count.
    too_short = ~jnp.all(reach <= listed * (1 + 1e-6))
    if n:
        edges = lax.cond(
            jnp.any(reach < listed * (1 - 1e-6)),
            lambda: _within(edges, positions, cell, system, reach),
            lambda: edges,
        )
    return _Drawn(edges[0], edges[1], edges[2], overflow, other, too_short)


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
    edges: tuple[Array, Array, Array], positions: Array, cell: Array, system: Array, reach: Array
) -> tuple[Array, Array, Array]:
    """Edges shorter than their systems' own cutoffs."""
    index, offsets, n_edges = edges
    n = positions.shape[0]
    used = (lax.iota(jnp.int32, index.shape[1]) < n_edges) & jnp.all(index < n, axis=0)
    i, j = jnp.where(used, index, 0)
    shift = jnp.einsum("ek,ekl->el", offsets, cell[system[i]], precision="highest")
    r = jnp.linalg.norm(positions[j] - positions[i] + shift, axis=-1)
    return compact(index, offsets, used & (r < reach[system[i]]))


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
