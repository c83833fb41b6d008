"""Runs all parts of the report."""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torchcall._doctor import caches, cpu, gpus, memory, self_tests, torch_half, versions
from torchcall._doctor.report import Section, as_json, examined, printed, summary


def sections(*, compile: bool, own_process: bool) -> Iterator[Section]:
    """Examines one part after the other.

    Args:
        compile: Whether to compile a small package if none is there.
        own_process: Whether the process runs nothing else. JAX then does not reserve the memory
            of a GPU.
    """
    probes: dict[str, Callable[[Section], None]] = {
        "versions": versions.probe,
        "torch_half": torch_half.probe,
        "cpu": cpu.probe,
        "memory": memory.probe,
        "gpus": functools.partial(gpus.probe, own_process=own_process),
        "caches": caches.probe,
        "self_tests": functools.partial(self_tests.probe, compile=compile),
    }
    for name, probe in probes.items():
        yield examined(name, probe)


def report(*, compile: bool, own_process: bool, show: bool) -> dict[str, Any]:
    """The report as a JSON object; also printed, part by part, with `show`."""
    found: list[Section] = []
    for section in sections(compile=compile, own_process=own_process):
        found.append(section)
        if show:  # at once: if a damaged library ends the process, the last part shows where
            print(printed(section), flush=True)
    if show:
        print(summary(found))
        sys.stdout.flush()
    return as_json(found)


def doctor(*, compile: bool = False) -> dict[str, Any]:
    """Checks the installation and prints a report.

    Args:
        compile: Compiles a small package if none is cached, to test the compiler. This takes about
            half a minute.

    Returns:
        The report, as `torchcall doctor --json` prints it. `report["ok"]` is False if anything is
        wrong; `report["problems"]` has each problem and the command that fixes it. Never raises.
    """
    return report(compile=compile, own_process=False, show=True)
