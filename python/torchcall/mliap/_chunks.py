"""Long runs in jitted chunks; a chunk whose neighbour list was too small is repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax import Array, lax

from torchcall.mliap._neighbors import check
from torchcall.mliap._neighbors.check import Problem
from torchcall.mliap._neighbors.neighbor_list import NeighborList, rebuilt, with_larger_bins
from torchcall.mliap._programs import Programs

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
    one compilation. In the static schedule, so does a last chunk that is shorter than the others.

    Programs are compiled once for each step function, shapes and schedule, and live as long as the
    function. So define ``step`` once, outside loops: a new function or ``functools.partial`` of the
    same code is compiled again. As with `jax.jit`, a compiled step does not see later changes of
    variables that it uses; put what changes into ``state``.

    Args:
        step: ``(state, neighbors) → (state, neighbors)``, traceable; calls
            ``neighbors.update(positions, cell)`` at the new positions and returns the updated list.
            Shapes and dtypes of ``state`` must not change. A function, a method or any callable.
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
        RunError: positions or cell became NaN or infinite, or the cell collapsed so far that no
            list is large enough.
        ValueError: a count is too small, the schedule is unknown, or a static schedule
            with ``rebuild_every > 1`` has no skin.
        TypeError: a count is not an int, or ``step`` does not return ``(state, neighbors)``.
    """
    _check(step, neighbors, n_steps, chunk, schedule, rebuild_every)
    every = 0 if schedule == "when-needed" else rebuild_every
    # A loop of known length never waits for the host on a GPU; any length shares one program.
    known = schedule == "static"
    run = _programs.get(step, known, _static_program if known else _program)
    done = 0
    if check.known_problems("run_chunks", neighbors.problems):
        if not _finite(neighbors):
            raise RunError(f"torchcall: run_chunks: {neighbors.why()}", 0, state, neighbors)
        neighbors = _grow(neighbors, neighbors)
    while done < n_steps:
        length = min(chunk, n_steps - done)
        with_schedule = replace(neighbors, schedule=_list_schedule(every))
        new_state, new = run(length, every, state, with_schedule)
        problems = int(np.asarray(new.problems))
        if problems == 0:
            done += length
            state, neighbors = new_state, replace(new, schedule=neighbors.schedule)
            if progress is not None:
                progress(done, state, neighbors)
            continue
        between = f"torchcall: run_chunks: between steps {done} and {done + length}"
        if problems & ~(Problem.SKIN | Problem.NOT_FINITE) and _finite(new):
            try:
                neighbors = _grow(replace(new, schedule=neighbors.schedule), neighbors)
            except ValueError as error:  # no list is large enough
                text = f"{between}: {new.why()}: {error}"
                raise RunError(text, done, state, neighbors) from error
        elif problems & Problem.SKIN and _finite(new):
            every = max(1, every // 2)
        else:
            raise RunError(f"{between}: {new.why()}", done, state, neighbors)
    return state, neighbors


def _list_schedule(every: int) -> Literal["when-needed", "always", "never"]:
    return "when-needed" if every == 0 else "always" if every == 1 else "never"


_programs = Programs()


def _program(step: Callable[[], Step[Any]]) -> Callable[..., Any]:
    """`run(length, 0, state, neighbors)`, one program for any length."""

    def run(length: Array, every: int, state: Any, neighbors: NeighborList) -> Any:
        del every
        return lax.fori_loop(0, length, _body(step()), (state, neighbors))

    return jax.jit(run, static_argnums=1)


def _static_program(step: Callable[[], Step[Any]]) -> Callable[..., Any]:
    """`run(length, every, state, neighbors)`, which searches every `every` steps."""

    def run(length: int, every: int, state: Any, neighbors: NeighborList) -> Any:
        one = _body(step())

        def block(_: Any, carry: tuple[Any, NeighborList], steps: int) -> Any:
            return lax.fori_loop(0, steps, one, (carry[0], carry[1].rebuild()))

        carry = (state, neighbors)
        if every == 1:
            return lax.fori_loop(0, length, one, carry)
        blocks, rest = divmod(length, every)
        if blocks:
            carry = lax.fori_loop(0, blocks, partial(block, steps=every), carry)
        return block(None, carry, rest) if rest else carry

    return jax.jit(run, static_argnums=(0, 1))


def _body(step: Step[Any]) -> Callable[[Any, tuple[Any, NeighborList]], Any]:
    def one(_: Any, carry: tuple[Any, NeighborList]) -> tuple[Any, NeighborList]:
        out = step(*carry)
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], NeighborList)):
            raise TypeError(
                "torchcall: run_chunks: step: expected (state, NeighborList), got "
                f"{type(out).__name__}"
            )
        return out

    return one


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
        new = rebuilt(grown, start.positions, start.cell)
        problems = int(np.asarray(new.problems))
        if problems == 0:
            return new
        # The failed geometry needs the shape of these bins: only their capacity grows.
        grown = with_larger_bins(new) if problems == Problem.BINS else new.grow()


def _check(
    step: Any,
    neighbors: Any,
    n_steps: int,
    chunk: int,
    schedule: str,
    rebuild_every: int,
) -> None:
    where = "torchcall: run_chunks"
    if not callable(step):
        raise TypeError(f"{where}: step: expected a function, got {step!r}")
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
