"""The stages of an update: search for candidates, and selection of those in the cutoff."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from torchcall.mliap._neighbors.check import Problem
from torchcall.mliap._neighbors.frame import Frame, make_frame
from torchcall.mliap._neighbors.in_jax.bins import (
    NO_IMAGE,
    BinRows,
    Bins,
    bin_atoms,
    find_rows,
    gather_pairs,
    row_words,
    unpack_image,
)
from torchcall.mliap._neighbors.in_jax.compact import (
    BITS,
    compact,
    mask_to_words,
    materialize,
)
from torchcall.mliap._neighbors.layout import Candidates, Layout, squared_threshold


def drift(
    frame: Frame, old: Candidates, positions: Array, cell: Array, pbc: Array, batch: Array
) -> tuple[Array, Array, Array]:
    """Difference between geometry and reference: ``x = x₀ F + u + n h`` with ``F = h₀⁻¹ h``.

    Returns:
        ``(strain, moved, since)``: an upper bound of the largest singular value of F⁻¹; the largest
            ``|u|``, in Å; and ``n``, (3, N) int32.
    """
    reference = make_frame(old.positions, old.cell, pbc, 0.0)
    eye = jnp.eye(3, dtype=cell.dtype)
    same = jnp.all(frame.cell == reference.cell, axis=(1, 2), keepdims=True)
    forward = jnp.where(
        same, eye, jnp.einsum("bij,bjk->bik", reference.inverse, frame.cell, precision="highest")
    )
    backward = jnp.where(
        same, eye, jnp.einsum("bij,bjk->bik", frame.inverse, reference.cell, precision="highest")
    )
    strain = 1 + jnp.max(jnp.sqrt(jnp.sum((backward - eye) ** 2, axis=(1, 2))))

    def atoms(values: Array) -> Array:
        return values[0] if values.shape[0] == 1 else values.at[batch].get(mode="promise_in_bounds")

    u = [
        positions[:, k] - sum(old.positions[:, a] * atoms(forward[:, a, k]) for a in range(3))
        for k in range(3)
    ]
    since = []
    for a in range(3):
        n = jnp.round(sum(u[k] * atoms(frame.inverse[:, k, a]) for k in range(3)))
        since.append(jnp.where(atoms(pbc[:, a]), n, jnp.zeros((), n.dtype)))
    u = [u[k] - sum(since[a] * atoms(frame.cell[:, a, k]) for a in range(3)) for k in range(3)]
    moved = jnp.sqrt(jnp.max(u[0] * u[0] + u[1] * u[1] + u[2] * u[2]))
    # Mask and offsets must use the same integers: compute them once.
    return strain, moved, materialize(jnp.stack(since).astype(jnp.int32))


def bins_and_rows(
    layout: Layout, frame: Frame, positions: Array, pbc: Array, batch: Array, limits: Array
) -> tuple[Bins, BinRows, Array]:
    assert layout.bins is not None
    radius = (layout.cutoff + layout.skin + frame.slack).astype(positions.dtype)
    # Bins are wider than the radius by the rounding error of an atom's bin number.
    bins = bin_atoms(layout.bins, frame, positions, pbc, batch, limits, radius + frame.slack)
    return bins, find_rows(layout.bins, frame, bins, pbc, batch, limits), radius


def find_candidates(
    layout: Layout,
    frame: Frame,
    positions: Array,
    cell: Array,
    pbc: Array,
    batch: Array,
    limits: Array,
) -> tuple[Candidates, Array]:
    assert layout.bins is not None
    bins, rows, radius = bins_and_rows(layout, frame, positions, pbc, batch, limits)
    words = row_words(layout.bins, frame, bins, rows, batch, radius)
    sender, receiver, image, count = gather_pairs(layout.bins, bins, rows, words, layout.candidates)
    problems = jnp.where(bins.covered, 0, Problem.CELL.value)
    problems |= jnp.where(jnp.max(rows.length) > layout.bins.row_capacity, Problem.BINS.value, 0)
    problems |= jnp.where(count > layout.candidates, Problem.CANDIDATES.value, 0)
    wraps = jnp.stack([bins.wraps[layout.bins.axes.index(a)] for a in range(3)])
    sender, receiver, image = materialize([sender, receiver, image])
    return Candidates(sender, receiver, image, count, wraps, positions, cell), problems.astype(
        jnp.int32
    )


def select_close(
    layout: Layout,
    candidates: Candidates,
    wraps: Array,
    positions: Array,
    cell: Array,
    batch: Array,
) -> tuple[Array, Array, Array]:
    """Selects ``|x_j − x_i + S h| < cutoff`` except (i, i, 0), in the positions' dtype."""
    limit = squared_threshold(layout.cutoff, np.dtype(positions.dtype))
    i, j, code = candidates.sender, candidates.receiver, candidates.image
    n_edges = layout.edges
    x = materialize([positions[:, k] for k in range(3)])

    def take(values: Array, index: Array) -> Array:
        return values.at[index].get(mode="promise_in_bounds")

    def offsets(i: Array, j: Array, code: Array) -> list[Array]:
        images = unpack_image(code)
        return [
            (images[a] + take(wraps[a], i) - take(wraps[a], j)).astype(positions.dtype)
            for a in range(3)
        ]

    s = offsets(i, j, code)
    system = None if cell.shape[0] == 1 else take(batch, i)
    square = jnp.zeros((), positions.dtype)
    for k in range(3):
        shift = sum(
            s[a] * (cell[0, a, k] if system is None else take(cell[:, a, k], system))
            for a in range(3)
        )
        difference = take(x[k], j) - take(x[k], i) + shift
        square += difference * difference
    # Compare indices, not lengths: atoms may coincide, and squares of short lengths underflow.
    itself = (i == j) & (code == NO_IMAGE)
    valid = (
        ~itself & (square < limit) & (jnp.arange(i.shape[0], dtype=jnp.int32) < candidates.n_pairs)
    )
    word, bit, count = compact(mask_to_words(valid), n_edges)
    source = materialize(jnp.minimum(word * BITS + bit, i.shape[0] - 1))
    slot_used = jnp.arange(n_edges, dtype=jnp.int32) < count
    i, j, code = (take(i, source), take(j, source), take(code, source))
    n_atoms = positions.shape[0]
    edge_index = jnp.stack([jnp.where(slot_used, i, n_atoms), jnp.where(slot_used, j, n_atoms)])
    s = offsets(i, j, code)
    unused = (1, 0, 0)
    columns = materialize(
        [jnp.where(slot_used, s[a], jnp.asarray(unused[a], s[a].dtype)) for a in range(3)]
    )
    cell_offsets = jnp.stack(columns, axis=-1)
    return edge_index.astype(jnp.int32), cell_offsets, count
