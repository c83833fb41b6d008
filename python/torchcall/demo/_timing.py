"""Interleaved timing: load on the machine affects all methods equally."""

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over `n` timed calls: median, interquartile range, and the least."""

    us_median: float
    us_iqr: float
    us_least: float
    n: int


Run = Callable[[int], float]
"""`run(calls)` makes that many calls, waits for the last, and returns the elapsed seconds."""


def interleave(
    methods: Mapping[str, Run], *, rounds: int, seconds: float, calls: int | None = None
) -> dict[str, Timing]:
    """Times the methods in interleaved rounds.

    Args:
        methods: By name; each has been compiled and called before.
        rounds: The number of samples per method.
        seconds: Approximate length of a sample; determines its number of calls.
        calls: The number of calls per sample, in place of `seconds`.

    Returns:
        For each method, the microseconds per call.
    """
    names = list(methods)
    counts = {name: calls or calls_for(methods[name], seconds) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for k in range(rounds):
        # The order rotates, so that no method always runs on the caches of the same one.
        shift = k % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(methods[name](counts[name]) / counts[name] * 1e6)
    return {name: summarise(values, counts[name] * rounds) for name, values in samples.items()}


def calls_for(run: Run, seconds: float) -> int:
    """The number of calls that lasts about `seconds`, at least one."""
    run(1)
    calls, taken = 1, run(1)
    while taken < 0.1 * seconds:
        calls *= 4
        taken = run(calls)
    return max(1, round(calls * seconds / taken))


def summarise(microseconds: list[float], n: int) -> Timing:
    """Median, interquartile range and least of the samples."""
    low, middle, high = np.percentile(microseconds, [25, 50, 75])
    return Timing(float(middle), float(high - low), min(microseconds), n)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, which must wait for its result."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine() -> dict[str, object]:
    """The CPU, number of cores and operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and the relevant packages."""
    found = {"python": platform.python_version()}
    for package in ("torchcall", "jax", "jaxlib", "torch", "numpy", "wrap_torch2jax"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"
