"""Long runs in jitted chunks; a chunk whose neighbour list was too small is repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax import lax

from torchcall.mliap._neighbors.check import Problem
from torchcall.mliap._neighbors.neighbor_list import NeighborList, with_larger_bins

State = TypeVar("State")
Step = Callable[[State, NeighborList], tuple[State, NeighborList]]
Progress = Callable[[int, State, NeighborList], Any]


class RunError(RuntimeError):
    """The run cannot continue. Holds the result of the last valid chunk.

    Attributes:
        done: number of valid steps.
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
    """Applies ``step`` ``n_steps`` times in jitted chunks; repeats chunks with an incomplete list.

    After each chunk, reads the list's ``did_overflow``. If it is true, discards the chunk's result,
    allocates a list with room for the geometry that overflowed, and repeats the chunk from its
    start. If a static schedule exceeded the skin, halves ``rebuild_every`` instead. Either costs
    one compilation, as does a last chunk that is shorter than the others.

    Args:
        step: ``(state, neighbors) → (state, neighbors)``, traceable; calls
            ``neighbors.update(positions, cell)`` at the new positions and returns the updated list.
            Shapes and dtypes of ``state`` must not change.
        state: any pytree of arrays.
        neighbors: list of the state's systems.
        n_steps: number of steps.
        chunk: steps between two checks of ``did_overflow``.
        schedule: "when-needed" repeats the search under ``lax.cond`` when atoms have moved by more
            than the skin allows; it suits CPUs. "static" searches every ``rebuild_every`` steps
            only; on a GPU it never waits for the host.
        rebuild_every: steps between two searches of the static schedule.
        progress: called after every valid chunk with ``(steps done, state, neighbors)``.

    Returns:
        State and list after ``n_steps``.

    Raises:
        RunError: positions or cell became NaN or infinite, or the cell collapsed.
        ValueError: a count is too small, the schedule is unknown, or a static schedule
            with ``rebuild_every > 1`` has no skin.
        TypeError: a count is not an int, or ``step`` does not return ``(state, neighbors)``.
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
    """The list at ``start``'s geometry, with room for that geometry and for the failed one."""
    grown = failed.grow()
    if grown.layout == failed.layout:
        # `grow` found room with bins of another shape. With their present shape the chunk would
        # fail again: enlarge these bins.
        grown = with_larger_bins(failed)
    while True:
        rebuilt = jax.jit(NeighborList.rebuild)(grown, start.positions, start.cell)
        problems = int(np.asarray(rebuilt.problems))
        if problems == 0:
            return rebuilt
        # The failed geometry needs the shape of these bins: only their capacity grows.
        grown = with_larger_bins(rebuilt) if problems == Problem.BINS else rebuilt.grow()


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
