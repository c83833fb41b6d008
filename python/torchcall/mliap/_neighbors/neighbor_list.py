"""The neighbour list: every directed pair closer than a cutoff, in fixed-size arrays.

The list holds ``(i, j, S)`` with ``r = x_j − x_i + S h`` and ``|r| < cutoff``, ``h`` the cell whose
rows are lattice vectors. Only ``(i, i, 0)`` is excluded: coincident atoms are listed.
`NeighborListFn.allocate` chooses the sizes of the arrays outside ``jit``; `NeighborList.update`
fills them inside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from torchcall.mliap._neighbors import check
from torchcall.mliap._neighbors.bins import row_words
from torchcall.mliap._neighbors.check import Problem
from torchcall.mliap._neighbors.compact import BITS, round_up
from torchcall.mliap._neighbors.frame import make_frame
from torchcall.mliap._neighbors.layout import plan_bins, with_rows
from torchcall.mliap._neighbors.search import (
    Candidates,
    Layout,
    bins_and_rows,
    drift,
    find_candidates,
    keep_close,
)

if TYPE_CHECKING:
    from torchcall.mliap._state._graph import Edges

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
        "limits",
        "candidates",
    ],
    meta_fields=["layout", "schedule"],
)
@dataclass(frozen=True)
class NeighborList:
    """All ``(i, j, S)`` with ``|x_j − x_i + S h| < cutoff`` but ``(i, i, 0)``.

    A pytree of arrays of fixed size.

    Attributes:
        edge_index: (2, E) int32, row 0 sender, row 1 receiver; valid edges first, sorted by sender;
            unused slots ``(N, N)``, N the number of atoms.
        cell_offsets: (E, 3), S in the positions' dtype; ``(1, 0, 0)`` in unused slots.
        n_edges: () int32, number of valid edges.
        problems: () int32, bits of `Problem`, kept until the next allocation.
        positions: (N, 3), positions of the last update that found no problem before it, in Å.
        cell: (B, 3, 3), cells of that update, in Å.
        pbc: (B, 3) bool.
        batch: (N,) int32, system of each atom.
        limits: (B, 3) int32, most bins along each lattice vector.
        candidates: Verlet list, None without a skin.
        layout: static numbers.
        schedule: what `update` does about a used-up skin, static: "when-needed" searches anew under
            ``lax.cond``, "always" searches every time, "never" raises the flag.
    """

    edge_index: Int[Array, "2 E"]
    cell_offsets: Float[Array, "E 3"]
    n_edges: Int[Array, ""]
    problems: Int[Array, ""]
    positions: Float[Array, "N 3"]
    cell: Float[Array, "B 3 3"]
    pbc: Bool[Array, "B 3"]
    batch: Int[Array, " N"]
    limits: Int[Array, "B 3"]
    candidates: Candidates | None
    layout: Layout
    schedule: Schedule = "when-needed"

    @property
    def did_overflow(self) -> Bool[Array, ""]:
        """Whether this list, or one it was updated from, may miss a pair; () bool."""
        return self.problems != 0

    def update(
        self, positions: Float[ArrayLike, "N 3"], cell: Float[ArrayLike, "B 3 3"]
    ) -> NeighborList:
        """List the pairs of new positions and cells; for use inside ``jit``, ``scan`` and ``vmap``.

        Derivatives stop here: differentiate an energy over the list at fixed pairs.

        Args:
            positions: (N, 3), in Å, wrapped or not, dtype as allocated.
            cell: (B, 3, 3), rows are lattice vectors, in Å, dtype as allocated.

        Returns:
            The list, with the same shapes. Look at ``did_overflow`` before trusting it.

        Raises:
            ValueError: a shape differs from the allocated one.
            TypeError: a dtype differs from the allocated one.
        """
        check.same_as_allocated("positions", positions, self.positions)
        check.same_as_allocated("cell", cell, self.cell)
        # Which pairs there are does not change smoothly; what is differentiable is their energy.
        positions, cell = lax.stop_gradient((jnp.asarray(positions), jnp.asarray(cell)))
        return _update(self, positions, cell, self.schedule)

    def rebuild(
        self,
        positions: Float[ArrayLike, "N 3"] | None = None,
        cell: Float[ArrayLike, "B 3 3"] | None = None,
    ) -> NeighborList:
        """`update` with an unconditional search, whatever the schedule.

        Args:
            positions: (N, 3), in Å; those of the last update if None.
            cell: (B, 3, 3), in Å; those of the last update if None.

        Returns:
            The list, with a fresh skin.
        """
        positions = self.positions if positions is None else positions
        cell = self.cell if cell is None else cell
        return replace(
            replace(self, schedule="always").update(positions, cell), schedule=self.schedule
        )

    def __call__(self, particles: Any, systems: Any, cutoffs: Any) -> Edges:
        """The edges of a state, as ``neighborlist_view`` wants them; for use inside ``jit``.

        A list that does not stand at these positions and cells is updated for it, which it forgets.

        Args:
            particles: table of particles in any order, as many in each system as allocated.
            systems: table of systems, with the periodicity as allocated.
            cutoffs: table by system, in Å, at most the list's own; longer pairs are left out.

        Returns:
            Edges with ``did_overflow``, true also for systems other than the allocated ones.

        Raises:
            ValueError, TypeError: as `update`; or a mismatch is known here, or something missing.
        """
        from torchcall.mliap._state._neighbors import list_edges

        return list_edges(self, particles, systems, cutoffs)

    def grow(self) -> NeighborList:
        """Allocate anew, outside ``jit``, with room for the geometry at which this list overflowed.

        Returns:
            A list at that geometry, no capacity smaller than before, without problems.

        Raises:
            ValueError: positions or cell were not finite.
        """
        for name in ("positions", "cell"):
            if not np.isfinite(getattr(self, name)).all():
                raise ValueError(
                    f"torchcall: NeighborList.grow: {name}: expected finite values at the update "
                    "that overflowed, got NaN or infinity"
                )
        grown = _allocate(self.positions, self.cell, self.pbc, self.batch, self.layout)
        return replace(grown, schedule=self.schedule)

    def why(self) -> str:
        """What made ``did_overflow`` true, in words; outside ``jit``."""
        return check.describe(int(np.asarray(self.problems)))


@dataclass(frozen=True)
class NeighborListFn:
    """What `neighbor_list` returns: the settings, and `allocate`.

    Attributes:
        cutoff: in Å.
        skin: in Å.
        capacity_multiplier: slack factor of every capacity.
    """

    cutoff: float
    skin: float
    capacity_multiplier: float

    def allocate(
        self,
        positions: Float[ArrayLike, "N 3"],
        cell: Float[ArrayLike, "B 3 3"],
        pbc: Bool[ArrayLike, "B 3"],
        batch: Int[ArrayLike, " N"],
    ) -> NeighborList:
        """Choose capacities from this geometry and list its pairs; outside ``jit``.

        Args:
            positions: (N, 3), float32 or float64, in Å, wrapped or not.
            cell: (B, 3, 3), rows are lattice vectors, in Å, the positions' dtype; rows of axes
                without periodicity are ignored and may be zero.
            pbc: (B, 3) bool.
            batch: (N,), system of each atom, nondecreasing, in ``[0, B)``.

        Returns:
            The list.

        Raises:
            TypeError: a dtype is wrong, or an argument is traced.
            ValueError: a shape is wrong, batch is not sorted or out of range, something is not
                finite, or the periodic lattice vectors of a system are zero or linearly dependent.
        """
        arrays = check.geometry(positions, cell, pbc, batch)
        layout = Layout(self.cutoff, self.skin, self.capacity_multiplier, 0, 0, None)
        return _allocate(*arrays, layout)


def neighbor_list(
    cutoff: float, *, skin: float = 0.0, capacity_multiplier: float = 1.25
) -> NeighborListFn:
    """Neighbour lists of all ``(i, j, S)`` with ``|x_j − x_i + S h| < cutoff`` but ``(i, i, 0)``.

    Atoms may coincide: no pair is too short to be listed.

    Args:
        cutoff: in Å, any length compared with the cell.
        skin: in Å. Pairs within cutoff + skin are remembered, and the search is repeated only when
            atoms and cell have moved so far that a pair could be missing; the list itself always
            ends at the cutoff.
        capacity_multiplier: at least 1; arrays have room for this many times what the allocated
            geometry needs.

    Returns:
        An object with ``allocate(positions, cell, pbc, batch)``.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is no number.
    """
    check.settings(cutoff, skin, capacity_multiplier)
    return NeighborListFn(float(cutoff), float(skin), float(capacity_multiplier))


def roomier(nbrs: NeighborList) -> NeighborList:
    """The list with bins of the same shape and room for twice as many atoms in a run of them."""
    bins = nbrs.layout.bins
    assert bins is not None
    # No run holds more than all atoms, as often as it goes round the cell.
    most = nbrs.positions.shape[0] * bins.turns
    bins = replace(bins, row_capacity=max(bins.row_capacity + 1, min(2 * bins.row_capacity, most)))
    layout = replace(nbrs.layout, bins=bins)
    geometry = (nbrs.positions, nbrs.cell, nbrs.pbc, nbrs.batch, nbrs.limits)
    return replace(_rebuild(_empty(layout, *geometry)), schedule=nbrs.schedule)


def _update(nbrs: NeighborList, positions: Array, cell: Array, schedule: Schedule) -> NeighborList:
    layout, before = nbrs.layout, nbrs.problems
    if layout.bins is None:
        return nbrs
    reach = layout.cutoff + layout.skin
    frame = make_frame(positions, cell, nbrs.pbc, reach)
    problems = jnp.where(frame.finite, 0, Problem.NOT_FINITE.value).astype(jnp.int32)

    def search() -> tuple[Candidates, Array]:
        return find_candidates(layout, frame, positions, cell, nbrs.pbc, nbrs.batch, nbrs.limits)

    old = nbrs.candidates
    if old is None or schedule == "always":
        candidates, found = search()
        wraps = candidates.wraps
    else:
        strain, moved, since = drift(frame, old, positions, cell, nbrs.pbc, nbrs.batch)
        # Not "reached > allowed": a NaN has to count as used up.
        enough = strain * (layout.cutoff + 2 * moved) + frame.slack <= reach
        if schedule == "never":
            candidates, wraps = old, old.wraps + since
            found = jnp.where(enough, 0, Problem.SKIN.value).astype(jnp.int32)
        else:
            candidates, found, wraps = lax.cond(
                enough,
                lambda: (old, jnp.zeros((), jnp.int32), old.wraps + since),
                lambda: ((found := search())[0], found[1], found[0].wraps),
            )
    edge_index, cell_offsets, n_edges = keep_close(
        layout, candidates, wraps, positions, cell, nbrs.batch
    )
    problems |= jnp.where(frame.finite, found, 0)
    problems |= jnp.where(frame.finite & (n_edges > layout.edges), Problem.EDGES.value, 0).astype(
        jnp.int32
    )
    # The geometry of the first problem is kept: `grow` makes room for it.
    fresh = before == 0
    return replace(
        nbrs,
        edge_index=edge_index,
        cell_offsets=cell_offsets,
        n_edges=n_edges,
        problems=before | problems,
        positions=jnp.where(fresh, positions, nbrs.positions),
        cell=jnp.where(fresh, cell, nbrs.cell),
        candidates=None if old is None else candidates,
    )


@partial(jax.jit, static_argnums=0)
def _measure(
    layout: Layout, positions: Array, cell: Array, pbc: Array, batch: Array, limits: Array
) -> Array:
    """Longest run, pairs within cutoff + skin and within the cutoff, self pairs too; (3,) int32."""
    assert layout.bins is not None
    frame = make_frame(positions, cell, pbc, layout.cutoff + layout.skin)
    bins, rows, radius = bins_and_rows(layout, frame, positions, pbc, batch, limits)
    radii = (radius, radius - layout.skin)
    counts = [
        jnp.sum(
            lax.population_count(row_words(layout.bins, frame, bins, rows, batch, r)),
            dtype=jnp.int32,
        )
        for r in radii[: 1 if layout.skin == 0 else 2]
    ]
    return jnp.stack([jnp.max(rows.length), counts[0], counts[-1]])


jitted_frame = jax.jit(make_frame)


@jax.jit
def _rebuild(nbrs: NeighborList) -> NeighborList:
    return nbrs.rebuild()


def _allocate(
    positions: Array, cell: Array, pbc: Array, batch: Array, layout: Layout
) -> NeighborList:
    """Allocate with the settings of ``layout`` and at least its capacities."""
    n_atoms = positions.shape[0]
    multiplier = layout.capacity_multiplier
    floor = layout.bins
    if n_atoms == 0:
        layout = replace(layout, edges=2, candidates=BITS, bins=None)
        return _empty(
            layout, positions, cell, pbc, batch, jnp.asarray(np.ones(pbc.shape, np.int32))
        )
    reach = layout.cutoff + layout.skin
    frame = jitted_frame(positions, cell, pbc, reach)
    check.frame(frame, pbc)
    fractions = np.einsum(
        "ni,nij->nj",
        np.asarray(positions, np.float64),
        np.asarray(frame.inverse, np.float64)[np.asarray(batch)],
    )
    plan = plan_bins(
        fractions,
        np.asarray(frame.heights, np.float64),
        np.asarray(pbc),
        np.asarray(batch),
        reach + 2 * float(frame.slack),
        floor,
    )
    geometry = (positions, cell, pbc, batch, jnp.asarray(plan.limits))
    sized = replace(layout, edges=2, candidates=BITS, bins=plan.layout)
    longest, count, n_edges = np.asarray(_measure(sized, *geometry)).tolist()
    if longest > plan.layout.row_capacity:
        sized = replace(sized, bins=replace(plan.layout, row_capacity=longest))
        longest, count, n_edges = np.asarray(_measure(sized, *geometry)).tolist()
    sized = Layout(
        cutoff=layout.cutoff,
        skin=layout.skin,
        capacity_multiplier=multiplier,
        edges=max(2, math.ceil((n_edges - n_atoms) * multiplier), layout.edges),
        candidates=max(round_up(math.ceil(count * multiplier), BITS), layout.candidates),
        bins=with_rows(plan.layout, longest, multiplier, floor),
    )
    return _rebuild(_empty(sized, *geometry))


def _empty(
    layout: Layout, positions: Array, cell: Array, pbc: Array, batch: Array, limits: Array
) -> NeighborList:
    n_atoms, dtype = positions.shape[0], positions.dtype
    count = jnp.asarray(np.int32(0))
    candidates = None
    if layout.skin > 0 and layout.bins is not None:
        slots = jnp.asarray(np.zeros(layout.candidates, np.int32))
        wraps = jnp.asarray(np.zeros((3, n_atoms), np.int32))
        candidates = Candidates(slots, slots, slots, count, wraps, positions, cell)
    return NeighborList(
        edge_index=jnp.asarray(np.full((2, layout.edges), n_atoms, np.int32)),
        cell_offsets=jnp.asarray(np.tile(np.array([[1, 0, 0]], dtype), (layout.edges, 1))),
        n_edges=count,
        problems=count,
        positions=positions,
        cell=cell,
        pbc=pbc,
        batch=batch,
        limits=limits,
        candidates=candidates,
        layout=layout,
    )
