"""Short lattice vectors for the search, where the cell is strongly tilted."""

from __future__ import annotations

import itertools

import numpy as np

_LARGEST_ERROR = 0.01  # Å


def reduced_bases(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Integer matrices of determinant ±1 whose ``basis @ cell`` has short lattice vectors.

    The vectors of the periodic axes are Minkowski-reduced (P. Q. Nguyen and D. Stehlé, ACM Trans.
    Algorithms 5, 46 (2009)); those of open axes are left alone. A cell whose vectors already
    are short keeps them.

    Args:
        cell: (B, 3, 3), rows are lattice vectors, finite.
        pbc: (B, 3) bool.

    Returns:
        (B, 3, 3) int32.

    Raises:
        ValueError: the vectors are combined with factors so large that the cell's dtype has no
            digits left for distances.
    """
    bases = np.broadcast_to(np.eye(3, dtype=np.int64), cell.shape).copy()
    vectors = np.where(pbc[:, :, None], cell.astype(np.float64), 0.0)
    gram = vectors @ vectors.swapaxes(1, 2)
    tilted = np.zeros(len(cell), bool)
    for a, b in itertools.combinations(range(3), 2):
        shorter = np.minimum(gram[:, a, a], gram[:, b, b])
        # A hexagonal cell, with exactly one half, is reduced.
        tilted |= 2 * np.abs(gram[:, a, b]) > 1.01 * shorter
    for s in np.flatnonzero(tilted):
        axes = np.flatnonzero(pbc[s])
        bases[s][np.ix_(axes, axes)] = _reduce(vectors[s][axes])
        _refuse_if_rounded(cell[s], bases[s], int(s))
    return bases.astype(np.int32)


def _refuse_if_rounded(cell: np.ndarray, basis: np.ndarray, system: int) -> None:
    """Raises if a short lattice vector, a sum of the cell's long ones, is not known to 0.01 Å."""
    lengths = np.linalg.norm(cell.astype(np.float64), axis=1)
    error = float(np.finfo(cell.dtype).eps * (np.abs(basis.astype(np.float64)) @ lengths).max())
    largest = int(np.abs(basis).max())
    if error > _LARGEST_ERROR:
        reason = f"with which {cell.dtype.name} rounds distances by up to {error:.2g} Å"
    elif largest > np.iinfo(np.int32).max:
        reason = "more than an int32 holds"
    else:
        return
    raise ValueError(
        f"torchcall: NeighborListFn.allocate: cell[{system}]: expected less tilted lattice "
        f"vectors: the shortest ones of this lattice combine them with factors up to {largest:.2g},"
        f" {reason}; reduce the cell first, for example by ase.geometry.minkowski_reduce"
    )


def _reduce(vectors: np.ndarray) -> np.ndarray:
    """The basis of two or three vectors: shortens each by the others until none becomes shorter."""
    n = len(vectors)
    basis = np.eye(n, dtype=np.int64)
    steps = [np.array(step) for step in itertools.product((-1, 0, 1), repeat=n - 1)]
    for _ in range(1000):
        reduced = basis @ vectors
        order = np.argsort(np.sum(reduced**2, axis=1), kind="stable")
        improved = False
        for k in order[::-1]:
            others = np.delete(basis, k, axis=0)
            projection, *_ = np.linalg.lstsq((others @ vectors).T, basis[k] @ vectors, rcond=None)
            nearest = np.rint(projection).astype(np.int64)
            trials = [basis[k] - (nearest + step) @ others for step in steps]
            lengths = [float(np.sum((trial @ vectors) ** 2)) for trial in trials]
            best = int(np.argmin(lengths))
            if lengths[best] < np.sum(reduced[k] ** 2) * (1 - 1e-9):
                basis[k] = trials[best]
                improved = True
                break
        if not improved:
            return basis
    return basis
