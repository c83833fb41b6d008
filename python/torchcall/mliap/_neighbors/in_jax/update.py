"""The list in JAX alone: its sizes and its update."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from torchcall.mliap._neighbors.check import Problem
from torchcall.mliap._neighbors.frame import make_frame
from torchcall.mliap._neighbors.in_jax.bins import BinLayout
from torchcall.mliap._neighbors.in_jax.plan import plan_bins, with_rows
from torchcall.mliap._neighbors.in_jax.search import (
    bins_and_rows,
    drift,
    find_candidates,
    select_close,
)
from torchcall.mliap._neighbors.layout import Candidates, Layout
from torchcall.mliap._neighbors.native import Operands, Updated


def update(operands: Operands, limits: Array, layout: Layout, schedule: str) -> Updated:
    """Brings a list up to date; the arguments and the result of `native.update`."""
    positions, pbc, batch, before = (
        operands.positions,
        operands.pbc,
        operands.batch,
        operands.problems,
    )
    cell = _search_cell(operands.basis, operands.cell, layout)
    reach = layout.cutoff + layout.skin
    frame = make_frame(positions, cell, pbc, reach)
    problems = jnp.where(frame.finite, 0, Problem.NOT_FINITE.value).astype(jnp.int32)

    def search() -> tuple[Candidates, Array]:
        return find_candidates(layout, frame, positions, cell, pbc, batch, limits)

    old = operands.candidates
    if old is None or schedule == "always":
        candidates, found = search()
        wraps = candidates.wraps
    else:
        strain, moved, since = drift(frame, old, positions, cell, pbc, batch)
        # Written so that NaN counts as "not enough".
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
    edge_index, offsets, n_edges = select_close(layout, candidates, wraps, positions, cell, batch)
    if layout.reduced:
        used = (jnp.arange(layout.edges, dtype=jnp.int32) < n_edges)[:, None]
        sender = jnp.minimum(edge_index[0], positions.shape[0] - 1)
        basis = operands.basis[batch[sender]].astype(offsets.dtype)
        offsets = jnp.where(used, jnp.einsum("ea,eak->ek", offsets, basis), offsets)
    problems |= jnp.where(frame.finite, found, 0)
    too_many = frame.finite & (n_edges > layout.edges)
    problems |= jnp.where(too_many, Problem.EDGES.value, 0).astype(jnp.int32)
    # Retain the geometry of the first problem: `grow` makes room for it.
    fresh = before == 0
    return Updated(
        edge_index,
        offsets,
        n_edges,
        before | problems,
        jnp.where(fresh, positions, operands.last_positions),
        jnp.where(fresh, operands.cell, operands.last_cell),
        None if old is None else candidates,
    )


def _search_cell(basis: Array, cell: Array, layout: Layout) -> Array:
    if not layout.reduced:
        return cell
    return jnp.einsum("bik,bkl->bil", basis.astype(cell.dtype), cell, precision="highest")


def with_bins(
    positions: Array,
    cell: Array,
    pbc: Array,
    batch: Array,
    basis: Array,
    layout: Layout,
    floor: BinLayout | None,
) -> tuple[Layout, Array]:
    """Adds the static numbers of the search; none is smaller than in ``floor``.

    Returns:
        The layout; and the largest number of bins of each system along each lattice vector,
        (B, 3) int32.
    """
    cell = _search_cell(basis, cell, layout)
    reach = layout.cutoff + layout.skin
    frame = jax.jit(make_frame)(positions, cell, pbc, reach)
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
    limits = jnp.asarray(plan.limits)
    layout = replace(layout, bins=plan.layout)
    longest = int(_longest_run(layout, positions, cell, pbc, batch, limits))
    bins = with_rows(plan.layout, longest, layout.capacity_multiplier, floor)
    return replace(layout, bins=bins), limits


@partial(jax.jit, static_argnums=0)
def _longest_run(
    layout: Layout, positions: Array, cell: Array, pbc: Array, batch: Array, limits: Array
) -> Array:
    frame = make_frame(positions, cell, pbc, layout.cutoff + layout.skin)
    return jnp.max(bins_and_rows(layout, frame, positions, pbc, batch, limits)[1].length)


def with_larger_bins(layout: Layout, n_atoms: int) -> Layout:
    """The layout with twice the capacity in each run of bins; the bins' shape does not change."""
    bins = layout.bins
    assert bins is not None
    # A run contains each atom at most once per period.
    most = n_atoms * bins.n_periods
    rows = max(bins.row_capacity + 1, min(2 * bins.row_capacity, most))
    return replace(layout, bins=replace(bins, row_capacity=rows))
