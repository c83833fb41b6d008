"""The static part of a list, and its Verlet list."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

if TYPE_CHECKING:
    from torchcall.mliap._neighbors.in_jax.bins import BinLayout


@dataclass(frozen=True)
class Layout:
    """Static part of a list: numbers that determine array sizes or the program.

    Attributes:
        cutoff: in Å.
        skin: in Å.
        capacity_multiplier: factor between the capacities and the sizes that are needed.
        edges: number of slots of the list.
        candidates: number of slots for pairs within cutoff + skin.
        bins: numbers of the search in JAX; None where the list is native.
        reduced: whether the search uses other lattice vectors than the cell's own.
    """

    cutoff: float
    skin: float
    capacity_multiplier: float
    edges: int
    candidates: int
    bins: BinLayout | None
    reduced: bool = False


class Candidates(NamedTuple):
    """Pairs within cutoff + skin of the reference geometry, the Verlet list.

    Attributes:
        sender: (V,), nondecreasing up to ``n_pairs``.
        receiver: (V,).
        image: (V,), packed images between wrapped positions.
        n_pairs: (), number of pairs.
        wraps: (3, N), number of lattice vectors subtracted from the reference positions, in the
            order of the search's lattice vectors.
        positions: (N, 3), reference positions, in Å.
        cell: (B, 3, 3), reference cells, in Å.
    """

    sender: Int[Array, " V"]
    receiver: Int[Array, " V"]
    image: Int[Array, " V"]
    n_pairs: Int[Array, ""]
    wraps: Int[Array, "3 N"]
    positions: Float[Array, "N 3"]
    cell: Float[Array, "B 3 3"]


def squared_threshold(cutoff: float, dtype: np.dtype) -> np.floating:
    """The smallest t with rounded ``√t ≥ cutoff``: ``d² < t`` is equivalent to ``|r| < cutoff``."""
    with np.errstate(over="ignore", under="ignore"):
        # A cutoff that is too short for the dtype still lists coincident atoms.
        c = max(dtype.type(cutoff), np.nextafter(dtype.type(0), dtype.type(1)))
        t = dtype.type(c * c)
        while np.sqrt(t) >= c:
            t = np.nextafter(t, dtype.type(0))
        while np.sqrt(t) < c:
            t = np.nextafter(t, dtype.type(np.inf))
    return t
