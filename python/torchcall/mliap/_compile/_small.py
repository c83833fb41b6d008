"""A small structure for tracing a module when the user passes no example."""

import itertools

import numpy as np
import torch

from torchcall.mliap._compile._form import Graph

_FRACTIONS = ((0.0, 0.0, 0.0), (0.0, 0.5, 0.5), (0.5, 0.0, 0.5), (0.5, 0.5, 0.0))


def small_example(cutoff: float, species: tuple[int, ...] | None, dtype: torch.dtype) -> Graph:
    """A periodic crystal of four atoms, a molecule of three, and the phantoms, as tensors.

    Nearest neighbours are half a cutoff apart, so each atom has several; no atom is at a symmetric
    site. A module may use other sizes than these: only static packages depend on them.

    Args:
        cutoff: in Å.
        species: the elements to use, in turn; hydrogen if None.
        dtype: of the floats.
    """
    random = np.random.default_rng(0)
    spacing = cutoff / 2
    cell = spacing * np.sqrt(2) * (np.eye(3) + random.uniform(-0.05, 0.05, (3, 3)))
    crystal = np.array(_FRACTIONS) @ cell
    molecule = spacing * np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.3, 0.9, 0.2]])
    cells = np.stack([cell, np.zeros((3, 3)), 2 * cutoff * np.eye(3)])
    pbc = np.array([[True] * 3, [False] * 3, [True] * 3])
    positions, first, edges, offsets = [], 0, [], []
    for k, sites in enumerate((crystal, molecule)):
        moved = sites + random.normal(scale=0.03 * spacing, size=sites.shape)
        index, shifts = _pairs(moved, cells[k], pbc[k], cutoff)
        positions.append(moved)
        edges.append(index + first)
        offsets.append(shifts)
        first += len(sites)
    positions.append(np.zeros((2, 3)))
    edges.append(np.full((2, 3), first))
    offsets.append(np.tile([1.0, 0.0, 0.0], (3, 1)))
    numbers = np.resize(species or (1,), first)
    arrays = {
        "pos": np.concatenate(positions),
        "atomic_numbers": np.append(numbers, [numbers[0]] * 2),
        "cell": cells,
        "pbc": pbc,
        "edge_index": np.concatenate(edges, 1),
        "cell_offsets": np.concatenate(offsets),
        "batch": np.repeat([0, 1, 2], [len(crystal), len(molecule), 2]),
        "charge": np.zeros(3),
        "spin": np.zeros(3),
    }
    tensors = {key: torch.from_numpy(array) for key, array in arrays.items()}
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def _pairs(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """All pairs within the cutoff, `(2, n)`, and their offsets `(n, 3)`, by brute force."""
    images = [range(-4, 5) if periodic else (0,) for periodic in pbc]
    shifts = np.array(list(itertools.product(*images)), float)
    r = positions[None, :, None] - positions[:, None, None] + shifts @ cell
    near = (r * r).sum(-1) < cutoff**2
    near &= ~(np.eye(len(positions), dtype=bool)[:, :, None] & (shifts == 0).all(1))
    sender, receiver, image = near.nonzero()
    return np.stack([sender, receiver]), shifts[image]
