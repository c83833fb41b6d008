"""Settings of a neighbour list, and its allocation."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int

from torchcall.mliap._neighbors import check
from torchcall.mliap._neighbors.layout import Layout
from torchcall.mliap._neighbors.neighbor_list import ArrayLike, NeighborList, allocated


@dataclass(frozen=True)
class NeighborListFn:
    """Settings of a neighbour list, and its allocation; made by `neighbor_list`.

    Attributes:
        cutoff: in Å.
        skin: in Å.
        capacity_multiplier: factor between the capacities and the sizes that are needed.
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
        """Chooses capacities for this geometry and lists its pairs; outside ``jit``.

        Args:
            positions: (N, 3), float32 or float64, in Å, wrapped or not.
            cell: (B, 3, 3), rows are lattice vectors, in Å, the positions' dtype; rows of axes
                without periodicity are ignored and may be zero.
            pbc: (B, 3) bool.
            batch: (N,), system of each atom, nondecreasing, in ``[0, B)``.

        Returns:
            The list, on the device of the positions if they are a JAX array on one device, else on
            JAX's default device.

        Raises:
            TypeError: a dtype is wrong, or an argument is traced.
            ValueError: a shape is wrong, batch is not sorted or out of range, a value is not
                finite, the periodic lattice vectors of a system are zero or linearly dependent, or
                there are too many pairs.
        """
        arrays = check.geometry(positions, cell, pbc, batch)
        layout = Layout(self.cutoff, self.skin, self.capacity_multiplier, 0, 0, None)
        return allocated(*arrays, layout)


def neighbor_list(
    cutoff: float, *, skin: float = 0.0, capacity_multiplier: float = 1.25
) -> NeighborListFn:
    """Lists of all ``(i, j, S)`` with ``|x_j − x_i + S h| < cutoff``, except ``(i, i, 0)``.

    Pairs of coincident atoms are included.

    Args:
        cutoff: in Å; may be longer than the lattice vectors.
        skin: in Å. Pairs within cutoff + skin are stored. The search is repeated only when atoms
            and cell have moved so far that a pair could be missing. The list itself always ends at
            the cutoff.
        capacity_multiplier: at least 1; capacities are this factor times the sizes that the
            allocated geometry needs.

    Returns:
        An object with ``allocate(positions, cell, pbc, batch)``.

    Raises:
        ValueError: an argument is out of range.
        TypeError: an argument is not a number.
    """
    check.settings(cutoff, skin, capacity_multiplier)
    return NeighborListFn(float(cutoff), float(skin), float(capacity_multiplier))
