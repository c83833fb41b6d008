"""Determines the sizes of a list's arrays at a concrete geometry."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from torchcall.mliap._neighbors import check
from torchcall.mliap._neighbors.bins import row_words
from torchcall.mliap._neighbors.compact import BITS, round_up
from torchcall.mliap._neighbors.frame import make_frame
from torchcall.mliap._neighbors.layout import plan_bins, with_rows
from torchcall.mliap._neighbors.search import Layout, bins_and_rows

_frame = jax.jit(make_frame)


def sized_for(
    positions: Array, cell: Array, pbc: Array, batch: Array, layout: Layout
) -> tuple[Layout, Array]:
    """A layout with room for this geometry; no capacity becomes smaller; outside ``jit``.

    Returns:
        The layout, without bins if there are no atoms; and the largest number of bins of each
        system along each lattice vector, (B, 3) int32.
    """
    n_atoms = positions.shape[0]
    multiplier = layout.capacity_multiplier
    floor = layout.bins
    if n_atoms == 0:
        layout = replace(layout, edges=2, candidates=BITS, bins=None)
        return layout, jnp.asarray(np.ones(pbc.shape, np.int32))
    reach = layout.cutoff + layout.skin
    frame = _frame(positions, cell, pbc, reach)
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
    return sized, geometry[-1]


@partial(jax.jit, static_argnums=0)
def _measure(
    layout: Layout, positions: Array, cell: Array, pbc: Array, batch: Array, limits: Array
) -> Array:
    """Longest run, and pairs within cutoff + skin and within cutoff, with (i, i, 0); (3,) int32."""
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
