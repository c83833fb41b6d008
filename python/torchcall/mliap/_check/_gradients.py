"""Gradients against finite differences whose steps are halved until they converge."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from torchcall.mliap._check import _hints
from torchcall.mliap._check._report import Finding
from torchcall.mliap._check._slopes import Slopes
from torchcall.mliap._check._trial import Trial

_DIRECTIONS = 4
# Larger uncertainties leave gradients unchecked, unless all are smaller than this, in eV/Å.
_LARGEST, _FLAT = 0.1, 1e-3


def findings(trial: Trial) -> Iterator[Finding]:
    """The findings of position and cell gradients."""
    slopes = differences(trial, "positions")
    positions = _finding(
        trial,
        slopes,
        "position_gradients are the derivatives of the energy",
        "Energy is not conserved and relaxations stall. ",
        lambda: _hints.positions(slopes),
    )
    yield positions
    if trial.out.cell_gradients is None:
        trial.notes.append("cell gradients are not checked: the model does not compute them")
        return
    cells = differences(trial, "cell")
    finding = _finding(
        trial,
        cells,
        "cell_gradients are the derivatives by the lattice vectors at fixed positions",
        "Pressures and cell relaxations are wrong. ",
        lambda: _hints.cells(trial, cells),
    )
    trial.cells_are_sound = positions.passed and finding.passed
    yield finding


def differences(trial: Trial, field: str) -> Slopes:
    """Central differences at steps h, h/2, h/4, …, extrapolated twice to order h⁶.

    Stops when two successive results agree, or when rounding errors exceed their difference. The
    steps of cells are scaled by 1 / max|S|, because S multiplies the displacement of the cell.
    """
    precise = trial.eps < 1e-10
    levels = 13 if precise else 6
    first = trial.eps ** (1 / 7) / 2
    if field == "cell":
        first /= trial.largest_offset
    first = min(first, 0.1)
    smallest = first / 2 ** (levels - 1)
    # Whole multiples of the smallest displacement: all steps follow exactly the same direction.
    unit = trial.rounded(trial.directions(field, _DIRECTIONS) * smallest)
    moves = unit / smallest
    expected = trial.slopes(field, trial.out, moves)
    scale = np.maximum(np.abs(expected), _size(trial, field))

    before: np.ndarray | None = None
    table: list[np.ndarray] = []
    result = np.zeros_like(expected)
    rounding = np.full(trial.n_systems, np.inf)
    truncation = np.full(trial.n_systems, np.inf)
    for level in range(levels):
        multiple = 2 ** (levels - 1 - level)
        step = smallest * multiple
        row = [np.zeros_like(expected)]
        for d, move in enumerate(unit):
            ends = [trial.moved(field, sign * multiple * move) for sign in (1, -1)]
            # Subtract the initial energies first: totals may be large.
            changes = [end.energy - trial.out.energy for end in ends]
            row[0][d] = (changes[0] - changes[1]) / (2 * step)
            if level == 0:
                # At a symmetric site gradients vanish; nearby ones show their usual size.
                near = [np.abs(trial.slopes(field, end, moves[d : d + 1])[0]) for end in ends]
                scale[d] = np.maximum(scale[d], np.maximum(*near))
        for order, coarse in enumerate(table[:2], 1):
            row.append(row[-1] + (row[-1] - coarse) / (4**order - 1))
        table, found = row, row[-1]
        if before is not None:
            # Two results of one direction may agree by chance: the worst direction counts.
            change, noise = np.abs(found - before).max(0), 5 * trial.noise / step
            better = noise + 2 * change < rounding + 2 * truncation
            result = np.where(better, found, result)
            rounding = np.where(better, noise, rounding)
            truncation = np.where(better, change, truncation)
            if (change <= np.maximum(_base(trial) * scale.min(0), noise)).all():
                break
        before = found
    scale = np.maximum(np.maximum(scale, np.abs(result)), _FLAT)
    return Slopes(result, expected, rounding, truncation, scale, moves)


def _base(trial: Trial) -> float:
    """Error of gradients that rounding explains, relative to their size."""
    return 2 * trial.eps**0.5


def _size(trial: Trial, field: str) -> np.ndarray:
    """Norm of each system's gradients."""
    if field == "positions":
        return trial.force
    assert trial.out.cell_gradients is not None
    return np.sqrt(np.square(trial.out.cell_gradients).sum((1, 2)))


def _finding(
    trial: Trial, slopes: Slopes, requirement: str, consequence: str, hint: Callable[[], str]
) -> Finding:
    scale = slopes.scale
    uncertainty = slopes.uncertainty / scale
    errors = np.abs(slopes.found - slopes.expected) / scale
    errors = np.where(np.isfinite(errors), errors, np.inf)
    tolerances = np.maximum(_base(trial), uncertainty)
    # The direction along the gradients has the largest change of the energy.
    hidden = (uncertainty.min(0, initial=np.inf) > _LARGEST) & (
        slopes.scale.max(0, initial=0) > _FLAT
    )
    wrong = (errors > tolerances) & ~hidden
    if wrong.any() or not hidden.any():
        place = np.unravel_index(np.argmax(errors / tolerances), errors.shape)
        error, tolerance = (float(a[place]) if errors.size else 0.0 for a in (errors, tolerances))
        if not wrong.any():
            trial.notes.extend(_limit(trial, requirement.split()[0], tolerance, slopes))
        systems = np.flatnonzero(wrong.any(0))
        where = ""
        if 0 < len(systems) < trial.n_systems:
            where = f"Only in system{'s' * (len(systems) > 1)} {', '.join(map(str, systems))}. "
        advice = consequence + where + (hint() if wrong.any() else "")
        return Finding(requirement, error, tolerance if errors.size else 1.0, advice)
    s = int(np.argmax(np.where(hidden, uncertainty.min(0), 0)))
    error = float(uncertainty[:, s].min())
    rounding = slopes.rounding[s] > slopes.truncation[s]
    return Finding(
        requirement,
        error,
        _LARGEST,
        _hints.rounding(trial, s) if rounding else _hints.NOT_SMOOTH,
    )


def _limit(trial: Trial, name: str, tolerance: float, slopes: Slopes) -> Iterator[str]:
    """What limits the check, unless it is as strict as float64 allows."""
    if trial.dtype == np.float64 and tolerance <= 3 * _base(trial):
        return
    text = f"{name} are checked to {tolerance:.0e} only"
    noise = float(trial.noise.max(initial=0))
    if slopes.rounding.max(initial=0) < slopes.truncation.max(initial=0):
        yield f"{text}: the error of finite differences falls slowly with the step"
    elif trial.dtype == np.float64:
        yield f"{text}: energies have errors of {noise:.0e} eV"
    else:
        yield f"{text}: float32 energies have errors of {noise:.0e} eV; float64 would check more"
