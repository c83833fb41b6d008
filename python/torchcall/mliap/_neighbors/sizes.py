"""Determines the sizes of a list's arrays at a concrete geometry."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array

from torchcall.mliap._neighbors import check, native
from torchcall.mliap._neighbors.frame import make_frame
from torchcall.mliap._neighbors.layout import Layout
from torchcall.mliap._neighbors.reduction import reduced_bases

_SIXTEENTHS = 16
_MOST_SLOTS = 2**30  # numbers of pairs are int32
_CHECKED_BYTES = 2**28  # smaller lists are not compared with the free memory


def sized_for(
    positions: Array, cell: Array, pbc: Array, batch: Array, layout: Layout
) -> tuple[Layout, np.ndarray]:
    """A layout with room for this geometry; no capacity becomes smaller; outside ``jit``.

    Returns:
        The layout, without bins; and the bases of the search, (B, 3, 3) int32.

    Raises:
        ValueError: the cell is flat, or so short that the search radius
            crosses it too often; atoms are too far from the origin; or there are too many pairs.
    """
    arrays = tuple(np.asarray(x) for x in (positions, cell, pbc, batch))
    basis = reduced_bases(arrays[1], arrays[2])
    layout = replace(layout, bins=None, reduced=bool((basis != np.eye(3)).any()))
    problems, candidates, edges = native.count(arrays, basis, layout)
    if not native.serves(positions):
        # The search in JAX also finds (i, i, 0).
        candidates += len(arrays[0])
    reach = layout.cutoff + layout.skin
    if problems:
        frame = jax.jit(make_frame)(positions, basis @ arrays[1], pbc, reach)
        check.frame(frame, pbc)
        heights = np.where(arrays[2], frame.heights, np.inf).min(axis=1)
        system = int(heights.argmin())
        raise ValueError(
            f"torchcall: NeighborListFn.allocate: cell[{system}]: expected lattice vectors that a "
            f"search radius of {reach:g} Å crosses at most 400 times, got faces "
            f"{heights[system]:g} Å apart"
        )
    multiplier = layout.capacity_multiplier
    pairs = max(edges, candidates)
    if pairs * multiplier > _MOST_SLOTS:
        raise ValueError(
            f"torchcall: NeighborListFn.allocate: expected at most 2**30 slots for pairs, got "
            f"{pairs} pairs within {reach:g} Å times capacity_multiplier={multiplier:g}"
        )
    sized = replace(
        layout,
        edges=max(capacity(edges * multiplier), layout.edges),
        candidates=max(capacity(candidates * multiplier), layout.candidates),
    )
    if native.serves(positions):
        _refuse_if_too_large(sized, arrays[0], edges)
    return sized, basis


def _refuse_if_too_large(layout: Layout, positions: np.ndarray, edges: int) -> None:
    """Raises if the list and its successor need more memory than is free."""
    bytes_per_edge = 8 + 3 * positions.dtype.itemsize
    needed = 2 * (bytes_per_edge * layout.edges + 12 * layout.candidates * (layout.skin > 0))
    free = free_memory() if needed > _CHECKED_BYTES else None
    if free is not None and needed > free:
        raise ValueError(
            f"torchcall: NeighborListFn.allocate: expected a list that fits into the free memory, "
            f"{free / 2**30:.1f} GiB, got {edges} pairs within {layout.cutoff:g} Å, "
            f"{edges / len(positions):.0f} per atom, which need {needed / 2**30:.1f} GiB without "
            "the model; has a cell collapsed?"
        )


def free_memory() -> int | None:
    """Bytes that this process can get at most, as Linux reports them; None elsewhere."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("MemAvailable:"))
        limits.append(1024 * int(line.split()[1]))
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limits.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(limits, default=None)


def capacity(needed: float) -> int:
    """The smallest number of slots that is at least ``needed``, of a fixed sequence.

    The sequence has 16 numbers between two powers of two, so that similar geometries have the same
    sizes and programs compiled for one serve the others.
    """
    n = max(2, math.ceil(needed))
    step = max(1, (1 << (n - 1).bit_length()) // (2 * _SIXTEENTHS))
    return -(-n // step) * step
