"""Chooses the static numbers of a neighbour search for a concrete geometry, on the host."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from torchcall.mliap._neighbors.in_jax.bins import BinLayout

# Cells may shrink by this factor before reach or n_periods must grow.
_HEADROOM = 1.03
# A system has at most this many bins per atom, so that empty space needs no memory.
_BINS_PER_ATOM = 8
_RUN_REACH = 4
_LARGEST_REACH = 400


class ChosenLayout(NamedTuple):
    """Static layout, and the largest numbers of bins, which are data."""

    layout: BinLayout
    limits: np.ndarray


def plan_bins(
    fractions: np.ndarray,
    heights: np.ndarray,
    pbc: np.ndarray,
    batch: np.ndarray,
    cutoff: float,
    floor: BinLayout | None = None,
) -> ChosenLayout:
    """Chooses the run axis, reaches and number of periods that make the search cheapest.

    Args:
        fractions: (N, 3), positions in units of the completed lattice vectors.
        heights: (B, 3), distance between faces, in Å.
        pbc: (B, 3).
        batch: (N,), nondecreasing.
        cutoff: search radius with skin and rounding, in Å.
        floor: layout with the run axis to use and the smallest reaches and number of periods.

    Returns:
        The plan, with an estimated row capacity.

    Raises:
        ValueError: the cutoff spans more images than an image number can represent.
    """
    n_systems = heights.shape[0]
    n_atoms = np.bincount(batch, minlength=n_systems)
    extents = _extents(fractions, batch, n_systems) * heights
    lengths = np.where(pbc, heights, extents)
    used = n_atoms > 0
    needed = np.where(pbc & used[:, None], np.ceil(_HEADROOM * cutoff / heights), 1).max(
        axis=0, initial=1
    )
    if needed.max() > _LARGEST_REACH:
        raise ValueError(
            f"torchcall: cell: expected lattice vectors that a search radius of {cutoff:g} Å "
            f"crosses at most {_LARGEST_REACH} times, got {int(needed.max())}"
        )
    best: tuple[float, ChosenLayout] | None = None
    for run, finer in itertools.product(range(3), (1, 2, 3)):
        axes = (run, (run + 1) % 3, (run + 2) % 3)
        if floor is not None and axes != floor.axes:
            continue
        reach = [max(int(needed[a]), finer) for a in axes]
        reach[0] = max(reach[0], _RUN_REACH)
        if floor is not None:
            reach = [max(r, f) for r, f in zip(reach, floor.reach, strict=True)]
        order = np.array(axes)
        wanted = np.maximum(np.floor(lengths[:, order] * np.array(reach) / cutoff), 1)
        limits = _limit(wanted, n_atoms)
        shrunk = np.minimum(
            np.maximum(np.floor(lengths[:, order] * np.array(reach) / cutoff / _HEADROOM), 1),
            limits,
        )
        periods_needed = np.where(
            pbc[:, order[0]] & used, np.ceil((2 * reach[0] + 1) / shrunk[:, 0]), 1
        )
        n_periods = int(periods_needed.max(initial=1))
        if floor is not None:
            n_periods = max(n_periods, floor.n_periods)
        in_run = np.minimum(1, (2 * reach[0] + 1) / limits[:, 0])
        mean = n_atoms * in_run / limits[:, 1] / limits[:, 2]
        row = float((mean + 3 * np.sqrt(mean)).max(initial=0)) + 1
        n_rows = n_periods * (2 * reach[1] + 1) * (2 * reach[2] + 1)
        cost = n_rows * (row + 6)
        if best is None or cost < best[0]:
            periodic = pbc[:, order]
            back = np.empty_like(limits)
            back[:, order] = limits
            layout = BinLayout(
                axes=axes,
                reach=(reach[0], reach[1], reach[2]),
                n_periods=n_periods,
                row_capacity=max(16, math.ceil(1.5 * row)),
                n_bins=max(1, int(limits.prod(axis=1).sum())),
                periodic=tuple(bool(p) for p in periodic.any(axis=0)),  # type: ignore[arg-type]
                open=tuple(bool(p) for p in (~periodic).any(axis=0)),  # type: ignore[arg-type]
            )
            best = cost, ChosenLayout(layout, back.astype(np.int32))
    assert best is not None
    return best[1]


def _extents(fractions: np.ndarray, batch: np.ndarray, n_systems: int) -> np.ndarray:
    low = np.full((n_systems, 3), np.inf)
    high = np.full((n_systems, 3), -np.inf)
    np.minimum.at(low, batch, fractions)
    np.maximum.at(high, batch, fractions)
    return np.where(np.isfinite(low), high - low, 0.0)


def _limit(wanted: np.ndarray, n_atoms: np.ndarray) -> np.ndarray:
    """Reduces the number of bins along the finest axes until no system has too many."""
    limits = wanted.copy()
    most = _BINS_PER_ATOM * n_atoms + 8
    for system in range(limits.shape[0]):
        while limits[system].prod() > most[system]:
            axis = int(limits[system].argmax())
            others = limits[system].prod() / limits[system, axis]
            second = np.sort(limits[system])[1]
            limits[system, axis] = max(
                math.floor(most[system] / others), min(second, limits[system, axis] // 2), 1
            )
    return limits


def with_rows(
    layout: BinLayout, longest: int, multiplier: float, floor: BinLayout | None
) -> BinLayout:
    """Sets the row capacity from the longest run."""
    capacity = max(1, math.ceil(longest * multiplier))
    if floor is not None:
        capacity = max(capacity, floor.row_capacity)
    return replace(layout, row_capacity=capacity)
