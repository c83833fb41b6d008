"""A simulation that explodes: when, which atom, under which force."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from torchcall.md.simulation import Frame, Group
from torchcall.md.system import System
from torchcall.mliap import RunError

MOST_PER_STEP = 1.0
"""In Å. Atoms of a sound simulation move by some hundredths of an Å in a step."""


@dataclass(frozen=True)
class Explosion:
    """What happened in the step after the last good frame.

    Attributes:
        steps: Good steps after the start of the record.
        replica, atom: Where.
        force: On the atom before the step, in eV/Å.
        moved: Of the atom in the step, in Å; may be NaN or infinite.
        good: The last good frame.
    """

    steps: int
    replica: int
    atom: int
    force: float
    moved: float
    good: Frame


def is_sound(system: System, frame: Frame, timestep: float) -> bool:
    """Whether all is finite, and no atom moves by more than `MOST_PER_STEP` in a step."""
    moves = _moves(system, frame, timestep)
    arrays = (frame.positions, frame.momenta, frame.forces, frame.potential)
    return all(np.isfinite(x).all() for x in arrays) and bool((moves < MOST_PER_STEP).all())


def find_explosion(
    system: System,
    group: Group,
    *,
    steps: int,
    timestep: float,
    single: Callable[[Group], Group],
    observe: Callable[[Group], Frame],
) -> Explosion | None:
    """Repeats a record step by step.

    Args:
        system: One replica.
        group: At the start of the record.
        steps: In the record.
        timestep: In ASE's unit.
        single: One step.
        observe: The frame of a group.

    Returns:
        None if every step is sound.
    """
    good = observe(group)
    for done in range(steps):
        try:
            group = single(group)
            frame = observe(group)
        except RunError:
            return _explosion(done, good, None)
        if not is_sound(system, frame, timestep):
            return _explosion(done, good, frame)
        good = frame
    return None


def _explosion(done: int, good: Frame, bad: Frame | None) -> Explosion:
    force = _lengths(good.forces)
    moves = np.full_like(force, np.inf) if bad is None else _lengths(bad.positions - good.positions)
    finite = np.isfinite(moves).all()
    replica, atom = np.unravel_index(np.argmax(moves if finite else force), force.shape)
    return Explosion(
        done,
        int(replica),
        int(atom),
        float(force[replica, atom]),
        float(moves[replica, atom]),
        good,
    )


def _lengths(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(np.asarray(vectors, float), axis=-1)


def _moves(system: System, frame: Frame, timestep: float) -> np.ndarray:
    """(R, N), the distance that each atom moves in a step, in Å."""
    return _lengths(frame.momenta) / system.masses * timestep
