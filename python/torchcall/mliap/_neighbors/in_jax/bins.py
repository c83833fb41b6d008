"""Finds pairs closer than a cutoff with bins: tests runs of sorted atoms.

Divides every system into bins along its reciprocal directions, and sorts atoms by bin; the bin
number along the run axis varies fastest. In each neighbouring column of bins, the possible
neighbours of an atom are then one contiguous run of the sorted atoms. Only bin numbers express
periodicity: bin ``b + d`` of an axis with ``n`` bins is bin ``(b + d) mod n`` of image
``floor((b + d) / n)``. This holds for any ratio of cutoff to cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from torchcall.mliap._neighbors.frame import Frame
from torchcall.mliap._neighbors.in_jax.compact import (
    BITS,
    compact,
    inclusive_sum,
    materialize,
    pack_bits,
)

_IMAGE_BITS = 10
_IMAGE_ZERO = 1 << (_IMAGE_BITS - 1)
NO_IMAGE = sum(_IMAGE_ZERO << (_IMAGE_BITS * axis) for axis in range(3))  # (0, 0, 0), packed


@dataclass(frozen=True)
class BinLayout:
    """Static numbers of a binned search; all other values are data.

    Attributes:
        axes: the run axis, then the two others, as indices of lattice vectors.
        reach: bins searched on each side, in the order of ``axes``.
        n_periods: number of periods of the run axis that are searched.
        row_capacity: capacity of a run, in atoms.
        n_bins: total number of bins of all systems.
        periodic: whether any system is periodic, in the order of ``axes``.
        open: whether any system is not periodic, in the order of ``axes``.
    """

    axes: tuple[int, int, int]
    reach: tuple[int, int, int]
    n_periods: int
    row_capacity: int
    n_bins: int
    periodic: tuple[bool, bool, bool]
    open: tuple[bool, bool, bool]

    @property
    def n_rows(self) -> int:
        """Number of runs searched for each atom."""
        return self.n_periods * (2 * self.reach[1] + 1) * (2 * self.reach[2] + 1)


class Bins(NamedTuple):
    """Atoms sorted by bin. Axes in the layout's order.

    Attributes:
        wrapped: (3, N), positions minus ``wraps @ cell``, in Å.
        wraps: (3, N), number of lattice vectors subtracted, zero along open axes.
        place: (3, N), bin of each atom along each axis.
        counts: (B, 3), bins of each system.
        starts: (n_bins + 1,), first sorted atom of each bin.
        order: (N,), atoms in sorted order.
        covered: (), whether ``reach`` and ``n_periods`` cover the cutoff in every system.
    """

    wrapped: Float[Array, "3 N"]
    wraps: Int[Array, "3 N"]
    place: Int[Array, "3 N"]
    counts: Int[Array, "B 3"]
    starts: Int[Array, " bins"]
    order: Int[Array, " N"]
    covered: Bool[Array, ""]


class BinRows(NamedTuple):
    """The runs of sorted atoms that contain each atom's possible neighbours; each (N, n_rows).

    Attributes:
        start: first sorted atom.
        length: number of atoms.
        column_end: sorted index of the column's end. There the run continues at the column's
            beginning, in the next image.
        column_length: number of atoms in the column.
        image: packed image numbers of the run's first atom.
        origin: three arrays, position of the central atom minus the image's shift, in Å.
    """

    start: Int[Array, "N rows"]
    length: Int[Array, "N rows"]
    column_end: Int[Array, "N rows"]
    column_length: Int[Array, "N rows"]
    image: Int[Array, "N rows"]
    origin: tuple[Float[Array, "N rows"], Float[Array, "N rows"], Float[Array, "N rows"]]


def _per_atom(values: Array, batch: Int[Array, " N"]) -> Array:
    """Values of the systems as values of the atoms; a scalar for a single system."""
    return values[0] if values.shape[0] == 1 else values.at[batch].get(mode="promise_in_bounds")


def _shift(cell: Float[Array, "B 3 3"], batch: Int[Array, " N"], n: list[Array], k: int) -> Array:
    """Cartesian component ``k`` of ``n @ cell`` for per-atom image numbers."""
    parts = [v.astype(cell.dtype) * _per_atom(cell[:, a, k], batch) for a, v in enumerate(n)]
    return parts[0] + parts[1] + parts[2]


def _fractions(inverse: Array, batch: Array, x: list[Array]) -> list[Array]:
    """Coordinates ``x`` in units of the lattice vectors."""
    columns = [[x[k] * _per_atom(inverse[:, k, a], batch) for k in range(3)] for a in range(3)]
    return [c[0] + c[1] + c[2] for c in columns]


def bin_atoms(
    layout: BinLayout,
    frame: Frame,
    positions: Float[Array, "N 3"],
    pbc: Bool[Array, "B 3"],
    batch: Int[Array, " N"],
    limits: Int[Array, "B 3"],
    cutoff: Float[Array, ""],
) -> Bins:
    """Wraps the atoms, chooses the bins' widths for this geometry, and sorts the atoms by bin.

    Args:
        layout: static numbers.
        frame: completed cells.
        positions: in Å.
        pbc: periodicity of each axis.
        batch: system of each atom.
        limits: largest number of bins of each system along each lattice vector.
        cutoff: search radius, skin and rounding included, in Å.

    Returns:
        The bins.
    """
    axes = np.array(layout.axes)
    cell, inverse, heights = frame.cell[:, axes], frame.inverse[..., axes], frame.heights[:, axes]
    pbc, limits = pbc[:, axes], limits[:, axes]
    x = [positions[:, k] for k in range(3)]
    wraps = [jnp.zeros(x[0].shape, jnp.int32) for _ in range(3)]
    # The second pass corrects the rounding of large fractional coordinates.
    for _ in range(2):
        fractions = _fractions(inverse, batch, x)
        whole = [
            jnp.where(_per_atom(pbc[:, a], batch), jnp.floor(fractions[a]), 0).astype(jnp.int32)
            for a in range(3)
        ]
        # Compute floors once: fusions that repeat them may round differently.
        whole = materialize(whole)
        x = [x[k] - _shift(cell, batch, whole, k) for k in range(3)]
        wraps = [wraps[a] + whole[a] for a in range(3)]
    fractions = _fractions(inverse, batch, x)

    reach = jnp.array(layout.reach, cell.dtype)
    wanted = jnp.floor(heights * reach / cutoff)
    most = limits.astype(cell.dtype)
    counts = jnp.where(pbc, jnp.clip(wanted, 1, most), most).astype(jnp.int32)
    index = []
    for a in range(3):
        scaled = fractions[a] * _per_atom(counts[:, a].astype(cell.dtype), batch)
        if layout.open[a]:
            n_systems = pbc.shape[0]
            low = jax.ops.segment_min(fractions[a], batch, n_systems, indices_are_sorted=True)
            high = jax.ops.segment_max(fractions[a], batch, n_systems, indices_are_sorted=True)
            width = jnp.maximum(
                (high - low) / most[:, a], cutoff / (layout.reach[a] * heights[:, a])
            )
            along = (fractions[a] - _per_atom(low, batch)) / _per_atom(width, batch)
            scaled = jnp.where(_per_atom(pbc[:, a], batch), scaled, along)
        index.append(jnp.clip(scaled.astype(jnp.int32), 0, _per_atom(counts[:, a], batch) - 1))

    index = materialize(index)
    first = _first_bins(limits)
    column = index[2] * _per_atom(counts[:, 1], batch) + index[1]
    bin_id = _per_atom(first, batch) + column * _per_atom(counts[:, 0], batch) + index[0]
    bin_id = jnp.clip(bin_id, 0, layout.n_bins - 1)
    occupancy = jnp.zeros(layout.n_bins, jnp.int32).at[bin_id].add(1, mode="promise_in_bounds")
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), inclusive_sum(occupancy)])
    # Systems without atoms have no pairs.
    sizes = limits[:, 0] * limits[:, 1] * limits[:, 2]
    empty = starts.at[first + sizes].get(mode="promise_in_bounds") == starts.at[first].get(
        mode="promise_in_bounds"
    )
    covered = jnp.all(empty[:, None] | ~pbc | (wanted >= 1))
    enough = counts[:, 0] * layout.n_periods >= 2 * layout.reach[0] + 1
    covered &= jnp.all(empty | ~pbc[:, 0] | enough)
    _, order = lax.sort((bin_id, lax.iota(jnp.int32, bin_id.shape[0])), num_keys=2, is_stable=False)
    return Bins(
        materialize(jnp.stack(x)),
        jnp.stack(wraps),
        jnp.stack(index),
        counts,
        starts,
        order,
        covered,
    )


def _first_bins(limits: Int[Array, "B 3"]) -> Int[Array, " B"]:
    sizes = limits[:, 0] * limits[:, 1] * limits[:, 2]
    return jnp.cumsum(sizes, dtype=jnp.int32) - sizes


def _floor_divide(x: Array, n: Array, most: int) -> Array:
    """``floor(x / n)`` for ``x ≥ −most · n``, by a truncating division."""
    return lax.div(x + most * n, jnp.broadcast_to(n, jnp.broadcast_shapes(x.shape, n.shape))) - most


def pack_image(axes: tuple[int, int, int], images: list[Array]) -> Array:
    """Packs image numbers, in the order of ``axes``, into an int32, in that of lattice vectors."""
    packed = 0
    for axis, image in zip(axes, images, strict=True):
        packed = packed + ((image + _IMAGE_ZERO) << (_IMAGE_BITS * axis))
    return jnp.asarray(packed, jnp.int32)


def unpack_image(packed: Int[Array, "*n"]) -> list[Int[Array, "*n"]]:
    """Inverse of `pack_image`, in the lattice vectors' order."""
    field = (1 << _IMAGE_BITS) - 1
    return [((packed >> (_IMAGE_BITS * axis)) & field) - _IMAGE_ZERO for axis in range(3)]


def find_rows(
    layout: BinLayout,
    frame: Frame,
    bins: Bins,
    pbc: Bool[Array, "B 3"],
    batch: Int[Array, " N"],
    limits: Array,
) -> BinRows:
    """The runs of each atom: one for each neighbouring column of bins and period of the run axis.

    Args:
        layout: static numbers.
        frame: completed cells.
        bins: sorted atoms.
        pbc: periodicity of each axis.
        batch: system of each atom.
        limits: largest number of bins of each system along each lattice vector.

    Returns:
        The runs; their length is zero if the column does not exist.
    """
    axes = np.array(layout.axes)
    cell, pbc = frame.cell[:, axes], pbc[:, axes]
    reach, n_periods = layout.reach, layout.n_periods
    n = [_per_atom(bins.counts[:, a], batch)[..., None] for a in range(3)]
    periodic = [_per_atom(pbc[:, a], batch)[..., None] for a in range(3)]
    period, step1, step2 = (
        grid.reshape(1, -1).astype(np.int32)
        for grid in np.meshgrid(
            np.arange(n_periods),
            np.arange(-reach[1], reach[1] + 1),
            np.arange(-reach[2], reach[2] + 1),
            indexing="ij",
        )
    )
    images, column, valid = [], [], True
    for a, step in ((1, step1), (2, step2)):
        moved = bins.place[a][:, None] + step
        image = _floor_divide(moved, n[a], reach[a])
        valid &= periodic[a] | (image == 0)
        images.append(image)
        column.append(moved - image * n[a])
    base = (
        _per_atom(_first_bins(limits[:, axes]), batch)[..., None]
        + (column[1] * n[1] + column[0]) * n[0]
    )

    first = bins.place[0][:, None] - reach[0] + period * n[0]
    last = jnp.minimum(first + n[0] - 1, bins.place[0][:, None] + reach[0])
    first = jnp.where(
        periodic[0],
        first,
        jnp.where(period == 0, jnp.maximum(bins.place[0][:, None] - reach[0], 0), 1),
    )
    last = jnp.where(
        periodic[0],
        last,
        jnp.where(period == 0, jnp.minimum(bins.place[0][:, None] + reach[0], n[0] - 1), 0),
    )
    image0 = _floor_divide(first, n[0], reach[0])
    phase = first - image0 * n[0]
    span = last - first + 1
    valid &= span > 0
    base = jnp.where(valid, base, 0)
    phase = jnp.where(valid, phase, 0)
    span = jnp.where(valid, span, 0)
    n0 = jnp.where(valid, n[0], 1)

    def at(b: Array) -> Array:
        return bins.starts.at[b].get(mode="promise_in_bounds")

    base, phase, span = materialize([base, phase, span])
    start, column_start, column_end = at(base + phase), at(base), at(base + n0)
    stop = phase + span
    around = stop > n0
    end = at(base + jnp.where(around, stop - n0, stop))
    column_length = column_end - column_start
    length = jnp.where(around, end - column_start + column_end - start, end - start)
    shift = [image0, *images]
    origin = tuple(
        bins.wrapped[k][:, None]
        - sum(
            image.astype(cell.dtype)
            * (cell[0, a, k] if cell.shape[0] == 1 else _per_atom(cell[:, a, k], batch)[:, None])
            for a, image in enumerate(shift)
        )
        for k in range(3)
    )
    image = pack_image(layout.axes, shift)
    length = jnp.where(valid, length, 0)
    start, length, column_end, column_length, image = materialize(
        [start, length, column_end, column_length, image]
    )
    x, y, z = materialize(list(origin))
    return BinRows(start, length, column_end, column_length, image, (x, y, z))


def row_words(
    layout: BinLayout,
    frame: Frame,
    bins: Bins,
    rows: BinRows,
    batch: Int[Array, " N"],
    cutoff: Float[Array, ""],
) -> UInt32[Array, " words"]:
    """Tests ``|r| < cutoff`` for every atom of every run; one bit each.

    Args:
        layout: static numbers.
        frame: completed cells.
        bins: sorted atoms.
        rows: runs.
        batch: system of each atom.
        cutoff: search radius, skin and rounding included, in Å.

    Returns:
        ``ceil(row_capacity / 32)`` words for each run, flattened, in the order of the central
        atoms.
    """
    run = frame.cell[:, layout.axes[0]]
    k = jnp.arange(layout.row_capacity, dtype=jnp.int32)
    index = rows.start[..., None] + k
    around = index >= rows.column_end[..., None]
    index = jnp.where(around, index - rows.column_length[..., None], index)
    index = jnp.clip(index, 0, bins.order.shape[0] - 1)
    sorted_x = materialize(bins.wrapped.at[:, bins.order].get(mode="promise_in_bounds"))
    square = jnp.zeros((), frame.cell.dtype)
    for axis in range(3):
        step = _per_atom(run[:, axis], batch)
        step = step if step.ndim == 0 else step[:, None, None]
        origin = rows.origin[axis][..., None]
        origin = jnp.where(around, origin - step, origin)
        difference = sorted_x[axis].at[index].get(mode="promise_in_bounds") - origin
        square += difference * difference
    inside = (square < cutoff * cutoff) & (k < rows.length[..., None])
    return materialize(pack_bits(inside).reshape(-1))


def gather_pairs(
    layout: BinLayout, bins: Bins, rows: BinRows, words: UInt32[Array, " words"], capacity: int
) -> tuple[Int[Array, " V"], Int[Array, " V"], Int[Array, " V"], Int[Array, ""]]:
    """The pairs whose bits are set, sorted by sender.

    Args:
        layout: static numbers.
        bins: sorted atoms.
        rows: runs.
        words: bits of `row_words`.
        capacity: number of slots.

    Returns:
        ``(sender, receiver, image, count)``; later slots are in range but arbitrary.
    """
    n_words = -(-layout.row_capacity // BITS)
    word, bit, count = compact(words, capacity)
    row = word if n_words == 1 else lax.div(word, jnp.int32(n_words))
    k = bit if n_words == 1 else bit + BITS * (word - row * n_words)
    sender = lax.div(row, jnp.int32(layout.n_rows))
    start, end, length, image = (
        part.reshape(-1).at[row].get(mode="promise_in_bounds")
        for part in (rows.start, rows.column_end, rows.column_length, rows.image)
    )
    index = start + k
    around = index >= end
    index = jnp.clip(jnp.where(around, index - length, index), 0, bins.order.shape[0] - 1)
    receiver = bins.order.at[index].get(mode="promise_in_bounds")
    image = jnp.where(around, image + (1 << (_IMAGE_BITS * layout.axes[0])), image)
    return sender, receiver, image, count
