"""Tests with kUPS, in an environment of their own: `make test-kups`."""

import numpy as np
import pytest


@pytest.fixture
def members():
    """Two distorted silicon cells: positions, numbers, cells, and the system of each atom."""
    generator = np.random.default_rng(0)
    corners = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]]) / 4
    frac = np.concatenate([corners, corners + 0.25])
    # Lower triangular, like kUPS' triclinic frames.
    cells = 5.43 * np.eye(3) + np.tril(generator.uniform(-0.3, 0.3, (2, 3, 3)))
    positions = np.concatenate([frac @ cell for cell in cells])
    positions += generator.normal(scale=0.08, size=positions.shape)
    order = generator.permutation(16)
    return positions[order], np.full(16, 14), cells, np.repeat([0, 1], 8)[order]
