"""The neighbour list: every directed pair closer than a cutoff, in fixed-size arrays.

The list contains ``(i, j, S)`` with ``r = x_j − x_i + S h`` and ``|r| < cutoff``. The rows of the
cell ``h`` are lattice vectors. Only ``(i, i, 0)`` is excluded: coincident atoms are listed.
`NeighborListFn.allocate` chooses the sizes of the arrays outside ``jit``; `NeighborList.update`
fills them inside ``jit``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from torchcall._call.meshes import aligned, whole
from torchcall._call.specs import any_traced
from torchcall.mliap._edges import Edges, within_cutoffs
from torchcall.mliap._neighbors import check, in_jax, native
from torchcall.mliap._neighbors.layout import Candidates, Layout
from torchcall.mliap._neighbors.native import Operands
from torchcall.mliap._neighbors.sizes import sized_for
from torchcall.mliap._rows import (
    cells_of,
    cutoffs_of,
    particle_rows,
    raise_if_concrete,
    required,
    system_rows,
)
from torchcall.mliap._table import Index, rows_of

ArrayLike = Array | np.ndarray
Schedule = Literal["when-needed", "always", "never"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "edge_index",
        "cell_offsets",
        "n_edges",
        "problems",
        "positions",
        "cell",
        "pbc",
        "batch",
        "basis",
        "limits",
        "candidates",
    ],
    meta_fields=["layout", "schedule"],
)
@dataclass(frozen=True)
class NeighborList:
    """All ``(i, j, S)`` with ``|x_j − x_i + S h| < cutoff``, except ``(i, i, 0)``; a pytree.

    Arrays have a fixed size.

    Attributes:
        edge_index: (2, E) int32, row 0 sender, row 1 receiver; valid edges first, sorted by sender;
            unused slots ``(N, N)``, N the number of atoms.
        cell_offsets: (E, 3), S in the positions' dtype; ``(1, 0, 0)`` in unused slots.
        n_edges: () int32, number of valid edges.
        problems: () int32, bits of `Problem`, set until the next allocation.
        positions: (N, 3), in Å, of the last update, or of the first one that found a problem.
        cell: (B, 3, 3), in Å, of the same update.
        pbc: (B, 3) bool.
        batch: (N,) int32, system of each atom.
        basis: (B, 3, 3) int32; the search uses the lattice vectors ``basis @ cell``.
        limits: (B, 3) int32, largest number of bins along each lattice vector, for a search in JAX;
            None on a CPU.
        candidates: Verlet list, None without a skin.
        layout: static numbers.
        schedule: when `update` searches, static. "when-needed": when the skin no longer suffices,
            under ``lax.cond``. "always": every time. "never": not at all; sets ``did_overflow`` if
            the skin does not suffice.
    """

    edge_index: Int[Array, "2 E"]
    cell_offsets: Float[Array, "E 3"]
    n_edges: Int[Array, ""]
    problems: Int[Array, ""]
    positions: Float[Array, "N 3"]
    cell: Float[Array, "B 3 3"]
    pbc: Bool[Array, "B 3"]
    batch: Int[Array, " N"]
    basis: Int[Array, "B 3 3"]
    limits: Int[Array, "B 3"] | None
    candidates: Candidates | None
    layout: Layout
    schedule: Schedule = "when-needed"

    @property
    def did_overflow(self) -> Bool[Array, ""]:
        """Whether this list, or one that it was updated from, may lack a pair; () bool."""
        return self.problems != 0

    def update(
        self, positions: Float[ArrayLike, "N 3"], cell: Float[ArrayLike, "B 3 3"]
    ) -> NeighborList:
        """Lists the pairs of new positions and cells; works in ``jit``, ``scan`` and ``vmap``.

        The list has no derivatives: differentiate an energy at fixed pairs. NumPy arrays are
        converted as by `jnp.asarray`: float64 becomes float32 while x64 is off.

        Args:
            positions: (N, 3), in Å, wrapped or not, dtype as allocated.
            cell: (B, 3, 3), rows are lattice vectors, in Å, dtype as allocated.

        Returns:
            The list, with the same shapes. Check its ``did_overflow``.

        Raises:
            ValueError: a shape differs from the allocated one, or lists are mapped.
            TypeError: a dtype differs from the allocated one.
        """
        check.one_list("NeighborList.update", self.problems)
        check.same_as_allocated("positions", positions, self.positions)
        check.same_as_allocated("cell", cell, self.cell)
        # The set of pairs has no derivative; the energy at fixed pairs has.
        positions, cell = lax.stop_gradient((jnp.asarray(positions), jnp.asarray(cell)))
        # Inside `shard_map`, a search must vary over the same axes of the mesh as the old list.
        leaves, tree = jax.tree.flatten((self, positions, cell))
        old, x, h = tree.unflatten(aligned(whole(leaves)))
        return _update(old, x, h, self.schedule)

    def rebuild(
        self,
        positions: Float[ArrayLike, "N 3"] | None = None,
        cell: Float[ArrayLike, "B 3 3"] | None = None,
    ) -> NeighborList:
        """`update` that always searches, for any schedule.

        Args:
            positions: (N, 3), in Å; those of the last update if None.
            cell: (B, 3, 3), in Å; those of the last update if None.

        Returns:
            The list, with new reference positions for its skin.
        """
        positions = self.positions if positions is None else positions
        cell = self.cell if cell is None else cell
        return replace(
            replace(self, schedule="always").update(positions, cell), schedule=self.schedule
        )

    def __call__(self, particles: Any, systems: Any, cutoffs: Any) -> Edges:
        """The edges of a state, the form that ``neighborlist_view`` requires; works in ``jit``.

        If positions or cells differ from those of this list, uses an updated copy of it, which is
        not stored.

        Args:
            particles: table of particles in any order, with the allocated number in each system.
            systems: table of systems, with the periodicity as allocated.
            cutoffs: table by system, in Å, at most the list's own; longer pairs are omitted.

        Returns:
            Edges; ``did_overflow`` is also true if the systems differ from the allocated ones.

        Raises:
            ValueError, TypeError: as for `update`; an attribute is missing; or concrete systems or
                cutoffs do not match the list.
        """
        return _list_edges(self, particles, systems, cutoffs)

    def grow(self) -> NeighborList:
        """Allocates a list large enough for the geometry that overflowed; outside ``jit``.

        Returns:
            A list at that geometry without problems. No capacity is smaller than before.

        Raises:
            ValueError: positions or cell were not finite, or this is not one list on one device.
            TypeError: the list is traced.
        """
        check.known_problems("NeighborList.grow", self.problems)
        for name in ("positions", "cell"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f"torchcall: NeighborList.grow: {name}: expected finite values at the update "
                    "that overflowed, got NaN or infinity"
                )
        grown = allocated(self.positions, self.cell, self.pbc, self.batch, self.layout)
        return replace(grown, schedule=self.schedule)

    def why(self) -> str:
        """Describes why ``did_overflow`` is true; outside ``jit``."""
        return check.describe(check.known_problems("NeighborList.why", self.problems))


def with_larger_bins(nbrs: NeighborList) -> NeighborList:
    """The list with twice the capacity in each run of bins, for a search in JAX."""
    layout = in_jax.with_larger_bins(nbrs.layout, nbrs.positions.shape[0])
    geometry = (nbrs.positions, nbrs.cell, nbrs.pbc, nbrs.batch, nbrs.basis, nbrs.limits)
    grown = rebuilt(empty(layout, *geometry), nbrs.positions, nbrs.cell)
    return replace(grown, schedule=nbrs.schedule)


def _update(nbrs: NeighborList, positions: Array, cell: Array, schedule: Schedule) -> NeighborList:
    if nbrs.positions.shape[0] == 0:
        return replace(nbrs, cell=cell)
    operands = Operands(
        positions,
        cell,
        nbrs.pbc,
        nbrs.batch,
        nbrs.basis,
        nbrs.problems,
        nbrs.positions,
        nbrs.cell,
        nbrs.candidates,
    )
    if nbrs.limits is not None:
        new = in_jax.update(operands, nbrs.limits, nbrs.layout, schedule)
    elif any_traced(jax.tree.leaves(operands)):
        new = native.update(operands, nbrs.layout, schedule)
    else:
        device = check.device_of("NeighborList.update", nbrs.positions)
        arrays = native.update_outside(operands, nbrs.layout, schedule)
        new = jax.device_put(arrays, device)
    return replace(
        nbrs,
        edge_index=new.edge_index,
        cell_offsets=new.cell_offsets,
        n_edges=new.n_edges,
        problems=new.problems,
        positions=new.last_positions,
        cell=new.last_cell,
        candidates=new.candidates,
    )


def rebuilt(nbrs: NeighborList, positions: Array, cell: Array) -> NeighborList:
    """`NeighborList.rebuild` outside programs; only a search in JAX is compiled."""
    if nbrs.limits is None:
        return nbrs.rebuild(positions, cell)
    return _rebuilt_in_jax(nbrs, positions, cell)


_rebuilt_in_jax = jax.jit(NeighborList.rebuild)


def allocated(
    positions: Array, cell: Array, pbc: Array, batch: Array, layout: Layout
) -> NeighborList:
    """A list with the settings of ``layout`` and at least its capacities."""
    if positions.shape[0] == 0:
        basis = jnp.broadcast_to(jnp.eye(3, dtype=jnp.int32), cell.shape)
        layout = replace(layout, edges=2, candidates=2, bins=None)
        return empty(layout, positions, cell, pbc, batch, basis, None)
    floor = layout.bins
    layout, found = sized_for(positions, cell, pbc, batch, layout)
    device = check.device_of("NeighborList.grow", positions)
    basis = jax.device_put(found, device)
    limits = None
    if not native.serves(positions):
        layout, limits = in_jax.with_bins(positions, cell, pbc, batch, basis, layout, floor)
    return rebuilt(empty(layout, positions, cell, pbc, batch, basis, limits), positions, cell)


def empty(
    layout: Layout,
    positions: Array,
    cell: Array,
    pbc: Array,
    batch: Array,
    basis: Array,
    limits: Array | None,
) -> NeighborList:
    """A list of these sizes before its first search."""
    n_atoms, dtype = positions.shape[0], positions.dtype
    (device,) = positions.devices()

    def put(value: np.ndarray) -> Array:
        # Unlike `jnp.asarray`, compiles nothing.
        return jax.device_put(value, device)

    count = put(np.zeros((), np.int32))
    candidates = None
    if layout.skin > 0 and n_atoms > 0:
        slots = put(np.zeros(layout.candidates, np.int32))
        wraps = put(np.zeros((3, n_atoms), np.int32))
        candidates = Candidates(slots, slots, slots, count, wraps, positions, cell)
    return NeighborList(
        edge_index=put(np.full((2, layout.edges), n_atoms, np.int32)),
        cell_offsets=put(np.tile(np.array([[1, 0, 0]], dtype), (layout.edges, 1))),
        n_edges=count,
        problems=count,
        positions=positions,
        cell=cell,
        pbc=pbc,
        batch=batch,
        basis=basis,
        limits=limits,
        candidates=candidates,
        layout=layout,
    )


def _list_edges(neighbors: NeighborList, particles: Any, systems: Any, cutoffs: Any) -> Edges:
    """Implements `NeighborList.__call__`."""
    atoms, boxes = particle_rows(particles), system_rows(systems)
    positions = jnp.asarray(atoms.data.positions)
    cell, pbc = cells_of(boxes)
    system = rows_of(required(atoms.data, "system", "particles"), boxes.keys, "particles.system")
    if system.shape != neighbors.batch.shape or cell.shape != neighbors.cell.shape:
        raise ValueError(
            "torchcall: neighborlist: expected the allocated numbers of atoms and systems, "
            f"{neighbors.batch.shape[0]} and {neighbors.cell.shape[0]}, "
            f"got {system.shape[0]} and {cell.shape[0]}"
        )
    values: Array | None = cutoffs_of(cutoffs, boxes, "cutoffs").astype(positions.dtype)
    listed = neighbors.layout.cutoff
    if not any_traced([values]) and np.allclose(values, listed, rtol=1e-6, atol=0):
        values = None
    cell, system = cell.astype(neighbors.cell.dtype), system.astype(jnp.int32)
    found = _find_edges(neighbors, *lax.stop_gradient((positions, cell)), pbc, system, values)
    raise_if_concrete(
        found.systems_differ,
        "neighborlist",
        "the allocated number of atoms in each system, and the allocated periodicity",
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
    index = lax.cond(as_allocated, lambda: index, lambda: rows[index])
    if cutoffs is None:
        return _FoundEdges(index, offsets, n_edges, overflow, differ, jnp.zeros((), bool))
    listed = neighbors.layout.cutoff
    # Negated, so that NaN counts as exceeded.
    exceeded = ~jnp.all(cutoffs <= listed * (1 + 1e-6))
    if n:
        edges = (index, offsets, n_edges)
        index, offsets, n_edges = lax.cond(
            jnp.any(cutoffs < listed * (1 - 1e-6)),
            lambda: within_cutoffs(edges, positions, cell, system, cutoffs),
            lambda: edges,
        )
    return _FoundEdges(index, offsets, n_edges, overflow, differ, exceeded)


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
