"""Derivatives of energies along directions, found and expected."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Slopes:
    """Derivatives of the energy along directions, by direction and system: (d, b).

    Attributes:
        found: by finite differences.
        expected: from the model's gradients.
        rounding, truncation: bounds on the errors of `found` in each system, (b,).
        scale: size of the compared values, positive.
        moves: the directions.
    """

    found: np.ndarray
    expected: np.ndarray
    rounding: np.ndarray
    truncation: np.ndarray
    scale: np.ndarray
    moves: np.ndarray

    @property
    def uncertainty(self) -> np.ndarray:
        """Bound on the errors of `found`."""
        return self.rounding + 2 * self.truncation
