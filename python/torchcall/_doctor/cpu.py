"""Processor, cores and threads."""

import math
import os
import platform
from pathlib import Path
from typing import Any

from torchcall._doctor.report import Section, imported

_FEATURES = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "amx_tile"),
    *("asimd", "sve", "bf16"),
)
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "ATEN_CPU_CAPABILITY")


def probe(section: Section) -> None:
    """Reports what the processor can do and how many threads run on it."""
    flags = processor_flags()
    features = [name for name in _FEATURES if name in flags]
    limit = cgroup_cores()
    usable = usable_cores()
    section.values |= {
        "features": features,
        "neighbor_list": "AVX2"
        if "avx2" in flags and platform.machine() == "x86_64"
        else "portable",
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "container_cores": limit,
        "variables": {name: os.environ.get(name) for name in _VARIABLES},
        "torch_capability": None,
        "torch_threads": None,
    }
    section.show("vector instructions", ", ".join(features) or "unknown")
    section.show("neighbour list uses", section.values["neighbor_list"])
    torch: Any = imported("torch")
    if torch is not None:
        section.values["torch_capability"] = torch.backends.cpu.get_cpu_capability()
        section.show("torch uses", section.values["torch_capability"])
    text = f"{usable} of {os.cpu_count()}"
    section.show("usable cores", text + (f" (limit of the container: {limit:g})" if limit else ""))
    for name, value in section.values["variables"].items():
        if value:
            section.show(name, value)
    if torch is not None:
        _threads(section, torch.get_num_threads(), usable)


def _threads(section: Section, threads: int, usable: int) -> None:
    section.values["torch_threads"] = threads
    section.show("torch threads per call", threads)
    if threads > usable:
        section.problem(
            f"torch uses {threads} threads in a call, on {usable} usable cores, which can be many "
            "times slower",
            f"export OMP_NUM_THREADS={usable}",
        )


def processor_flags() -> list[str]:
    """Linux' names of the processor's features; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    found = (line.partition(":") for line in lines)
    return next(
        (text.split() for key, _, text in found if key.strip() in ("flags", "Features")), []
    )


def usable_cores() -> int:
    """The cores that this process may use, by affinity and by its container's limit."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # macOS
        cores = os.cpu_count() or 1
    limit = cgroup_cores()
    return max(1, min(cores, math.ceil(limit))) if limit else cores


def cgroup_cores(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """The processor time that a container may use, in cores, or None without a limit."""
    try:
        quota, period = (root / "cpu.max").read_text().split()[:2]
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:  # "max" or -1
        return None
    return int(quota) / int(period)
