"""The progress bar: steps/s, ns/day, temperature, energy."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import numpy as np

from torchcall.md.simulation import Frame


class Progress:
    """A bar of steps, on stderr.

    Args:
        start, total: Steps done and wanted.
        timestep: In fs.
        n_atoms: Of one replica.
    """

    def __init__(self, start: int, total: int, timestep: float, n_atoms: int) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
        self._start, self._timestep, self._atoms = start, timestep, n_atoms
        self._begun = self._shown = time.perf_counter()

    def show(self, step: int, frame: Frame) -> None:
        """Moves the bar, ten times per second at most."""
        now = time.perf_counter()
        if step < self._bar.total and now - self._shown < 0.1:
            return
        self._shown, seconds = now, now - self._begun
        ns_per_day = (step - self._start) / seconds * 86400 * self._timestep * 1e-6
        energy = float(np.mean(frame.potential + frame.kinetic)) / self._atoms
        self._bar.set_postfix_str(
            f"{ns_per_day:.3g} ns/day, {np.mean(frame.temperature):.0f} K, {energy:.4f} eV/atom",
            refresh=False,
        )
        self._bar.update(step - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
