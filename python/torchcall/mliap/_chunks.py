"""Long runs over a neighbour list: jitted chunks, redone where the list was too small."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax import lax

from torchcall.mliap._neighbors.check import Problem
from torchcall.mliap._neighbors.neighbor_list import NeighborList, roomier

State = TypeVar("State")
Step = Callable[[State, NeighborList], tuple[State, NeighborList]]
Progress = Callable[[int, State, NeighborList], Any]


class RunError(RuntimeError):
    """A run that cannot go on, with everything up to the last good chunk.

    Attributes:
        done: steps done and kept.
        state: state after them.
        neighbors: list after them.
    """

    def __init__(self, message: str, done: int, state: Any, neighbors: NeighborList) -> None:
        super().__init__(message)
        self.done = done
        self.state = state
        self.neighbors = neighbors


def run_chunks(
    step: Step[State],
    state: State,
    neighbors: NeighborList,
    n_steps: int,
    *,
    chunk: int = 100,
    schedule: Literal["when-needed", "static"] = "when-needed",
    rebuild_every: int = 10,
    progress: Progress[State] | None = None,
) -> tuple[State, NeighborList]:
    """``step`` applied ``n_steps`` times, in jitted chunks of which only those with a complete list
    are kept.

    After each chunk the list's ``did_overflow`` is read. If it is true the chunk's result is thrown
    away, the list is allocated anew with room for the geometry that it failed at, and the chunk is
    done again from its start; a skin that a static schedule used up halves ``rebuild_every``
    instead. Each of the two costs one compilation. A last chunk that is shorter than the others
    costs one more.

    Args:
        step: ``(state, neighbors) → (state, neighbors)``, traceable; calls
            ``neighbors.update(positions, cell)`` at the new positions and returns the updated list.
            Shapes and dtypes of ``state`` stay.
        state: any pytree of arrays.
        neighbors: list of the state's systems.
        n_steps: number of steps.
        chunk: steps between two looks at the flag.
        schedule: "when-needed" searches anew under ``lax.cond`` as soon as the skin is used up,
            which suits CPUs; "static" searches every ``rebuild_every`` steps and nowhere else,
            which on GPUs never waits for the host.
        rebuild_every: steps between two searches of the static schedule.
        progress: called after every kept chunk with ``(steps done, state, neighbors)``.

    Returns:
        State and list after ``n_steps``.

    Raises:
        RunError: positions or cell ceased to be finite, or the cell collapsed.
        ValueError: a count is too small, the schedule is unknown, or a static schedule has no
            skin to live on.
        TypeError: a count is no int, or ``step`` does not return ``(state, neighbors)``.
    """
    _check(step, state, neighbors, n_steps, chunk, schedule, rebuild_every)
    every = 0 if schedule == "when-needed" else rebuild_every
    run = jax.jit(partial(_run_chunk, step), static_argnums=(0, 1))
    done = 0
    if int(np.asarray(neighbors.problems)):
        if not _finite(neighbors):
            raise RunError(f"torchcall: run_chunks: {neighbors.why()}", 0, state, neighbors)
        neighbors = _grow(neighbors, neighbors)
    while done < n_steps:
        length = min(chunk, n_steps - done)
        new_state, new = run(
            length, every, state, replace(neighbors, schedule=_list_schedule(every))
        )
        problems = int(np.asarray(new.problems))
        if problems == 0:
            done += length
            state, neighbors = new_state, replace(new, schedule=neighbors.schedule)
            if progress is not None:
                progress(done, state, neighbors)
            continue
        if problems & ~(Problem.SKIN | Problem.NOT_FINITE) and _finite(new):
            neighbors = _grow(replace(new, schedule=neighbors.schedule), neighbors)
        elif problems & Problem.SKIN and _finite(new):
            every = max(1, every // 2)
        else:
            raise RunError(
                f"torchcall: run_chunks: between steps {done} and {done + length}: {new.why()}",
                done,
                state,
                neighbors,
            )
    return state, neighbors


def _list_schedule(every: int) -> Literal["when-needed", "always", "never"]:
    return "when-needed" if every == 0 else "always" if every == 1 else "never"


def _run_chunk(
    step: Step[State], length: int, every: int, state: State, neighbors: NeighborList
) -> tuple[State, NeighborList]:
    def one(carry: tuple[State, NeighborList], _: None) -> tuple[tuple[State, NeighborList], None]:
        return step(*carry), None

    def block(carry: tuple[State, NeighborList], steps: int) -> tuple[State, NeighborList]:
        state, neighbors = carry
        return lax.scan(one, (state, neighbors.rebuild()), None, length=steps)[0]

    carry = (state, neighbors)
    if every <= 1:
        return lax.scan(one, carry, None, length=length)[0]
    blocks, rest = divmod(length, every)
    if blocks:
        carry = lax.scan(lambda c, _: (block(c, every), None), carry, None, length=blocks)[0]
    return block(carry, rest) if rest else carry


def _finite(neighbors: NeighborList) -> bool:
    return bool(np.isfinite(neighbors.positions).all() and np.isfinite(neighbors.cell).all())


def _grow(failed: NeighborList, start: NeighborList) -> NeighborList:
    """Room for the geometry that failed and for the one to start again from, held at the latter."""
    grown = failed.grow()
    if grown.layout == failed.layout:
        # The bins of another shape have room, and those of this one will do so again in vain.
        grown = roomier(failed)
    while True:
        held = jax.jit(NeighborList.rebuild)(grown, start.positions, start.cell)
        problems = int(np.asarray(held.problems))
        if problems == 0:
            return held
        # Bins keep their shape here, which the failed geometry needs; only their room grows.
        grown = roomier(held) if problems == Problem.BINS else held.grow()


def _check(
    step: Step[Any],
    state: Any,
    neighbors: Any,
    n_steps: int,
    chunk: int,
    schedule: str,
    rebuild_every: int,
) -> None:
    where = "torchcall: run_chunks"
    if not isinstance(neighbors, NeighborList):
        raise TypeError(
            f"{where}: neighbors: expected a NeighborList, got {type(neighbors).__name__}"
        )
    if schedule not in ("when-needed", "static"):
        raise ValueError(f'{where}: schedule: expected "when-needed" or "static", got {schedule!r}')
    for name, value, least in (
        ("n_steps", n_steps, 0),
        ("chunk", chunk, 1),
        ("rebuild_every", rebuild_every, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{where}: {name}: expected an int, got {value!r}")
        if value < least:
            raise ValueError(f"{where}: {name}: expected at least {least}, got {value}")
    if schedule == "static" and rebuild_every > 1 and neighbors.layout.skin == 0:
        raise ValueError(
            f"{where}: schedule: expected a list with a skin, or rebuild_every=1, for the "
            f"static schedule; got skin 0 and rebuild_every={rebuild_every}"
        )
    out = jax.eval_shape(step, state, neighbors)
    if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], NeighborList)):
        raise TypeError(f"{where}: step: expected (state, NeighborList), got {type(out).__name__}")
