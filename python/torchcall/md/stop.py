"""The ends of a run before its last step."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from ase import units

from torchcall._command.files import write_whole
from torchcall._command.parsing import PROGRAM, CommandError
from torchcall.md.explosion import find_explosion
from torchcall.md.files import extxyz
from torchcall.md.process import Terminated
from torchcall.md.simulation import Group, Simulation
from torchcall.md.system import System

_NO_MEMORY = ("RESOURCE_EXHAUSTED", "DefaultCPUAllocator", "std::bad_alloc")
"""In the errors of XLA, torch and C++."""


def explain(error: BaseException, step: int, log: Path) -> NoReturn:
    """Raises what the user sees of an error that ended a run after this step."""
    again = f"continue with {PROGRAM} md --restart --log {log}"
    if isinstance(error, KeyboardInterrupt):
        name, status = ("SIGTERM", 143) if isinstance(error, Terminated) else ("Ctrl-C", 130)
        raise CommandError(f"stopped by {name} after step {step}; {again}", status) from error
    if isinstance(error, BrokenPipeError):  # nobody reads what it prints
        raise error
    if isinstance(error, OSError) and error.errno:
        raise CommandError(
            f"cannot write after step {step}: {error.strerror}; the files are whole up to "
            f"the last checkpoint. Make room, then {again}",
            1,
        ) from error
    if isinstance(error, MemoryError) or any(text in str(error) for text in _NO_MEMORY):
        raise CommandError(
            f"out of memory after step {step}; the files are whole. With more memory, {again}", 1
        ) from error
    raise error


def explode(
    options: argparse.Namespace,
    system: System,
    simulation: Simulation,
    step: int,
    before: list[Group],
) -> NoReturn:
    """Finds the step and the atom that exploded, and writes the last good frame.

    Args:
        options: The run's.
        system, simulation: What runs.
        step: The steps of the last sound record.
        before: The groups of that record.

    Raises:
        CommandError: Always, with step, atom, force and file.
    """
    timestep = options.timestep * units.fs
    first = 0
    for group in before:
        found = find_explosion(
            system,
            group,
            steps=options.every,
            timestep=timestep,
            single=simulation.single,
            observe=simulation.frame,
        )
        if found is not None:
            last, replica = step + found.steps, first + found.replica
            path = options.log.with_suffix(".last-good.extxyz")
            info = {"step": last, "time_ps": last * options.timestep * 1e-3}
            frame, kept = extxyz(system, found.good, found.replica, **info), f"is in {path}"
            try:
                write_whole(path, frame)
            except OSError as error:
                kept = f"cannot be written to {path}: {error.strerror}"
            where = f" of replica {replica}" if options.replicas > 1 else ""
            raise CommandError(
                f"the simulation exploded in step {last + 1}: atom {found.atom}{where} "
                f"({system.symbols[found.atom]}) moves {found.moved:.3g} Å in it under a "
                f"force of {found.force:.3g} eV/Å. The last good frame, of step {last}, "
                f"{kept}. Try a smaller --timestep, or relax the structure first",
                1,
            )
        first += len(group.state.cell)
    raise CommandError(
        f"the simulation exploded between steps {step} and {step + options.every}; "
        "try a smaller --timestep, or relax the structure first",
        1,
    )
