"""What a user waits for, each in fresh processes: imports, first list, first steps, peak memory.

    OMP_NUM_THREADS=1 python benchmarks/latency.py --json benchmarks/results/latency.json

Argon is the demo's: 500 atoms, cutoff 8.5 Å, skin 1 Å, one torch thread. The list of many atoms has
silicon's density and a cutoff of 5 Å, as in `neighbor_list.py`. JAX's persistent cache is off,
except in the rows that say so. Files are in the page cache: every task runs once before.

With `--network mace` or `--network sevennet`, in the network's environment (`make bench-networks`):
from an empty process to 100 steps of 8 and 64 atoms, torchcall with the network's package from the
cache beside ASE with the network's own calculator.
"""

# pyright: reportMissingImports=false
# The networks are optional.

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _harness import Report, parser

from torchcall.demo._timing import Timing, summarise

CHILD = Path(__file__).with_name("_latency.py")
WHOLE = "whole process"


@dataclass(frozen=True)
class Row:
    """A figure and its goal.

    Attributes:
        case: what the user waits for.
        key: its name in the child's result.
        goal: in `unit`; None where there is none.
        unit: "s", "ms" or "ns".
    """

    case: str
    key: str
    goal: float | None
    unit: str = "s"


SCALES = {"s": 1e-6, "ms": 1e-3, "ns": 1e3}  # from µs
IMPORTS = [
    Row("import torchcall, after jax and torch", "import torchcall", 0.2),
    Row("import torchcall.mliap, after that", "import torchcall.mliap", None),
]
LISTS = [
    Row("first neighbor_list(...).allocate, 500 atoms", "allocate", 0.3),
    Row("list update within the skin, per edge", "update per edge", 5.0, "ns"),
]
COLD = [
    Row("first run_chunks of 50 steps", "run_chunks", 2.5),
    Row(
        "the same run_chunks again, beyond its steps",
        "run_chunks again, beyond its steps",
        10.0,
        "ms",
    ),
]
WARM = [Row("first run_chunks of 50 steps, JAX's cache warm", "run_chunks", 1.2)]
EAGER = [
    Row("eager value_and_grad(energy), first call", "value_and_grad, first", None),
    Row("eager value_and_grad(energy), second call", "value_and_grad, second", 5.0, "ms"),
    # What it is made of: the evaluation, and what JAX needs to differentiate one function.
    Row("eager energy_and_gradients, second call", "energy_and_gradients", None, "ms"),
    Row("eager value_and_grad of a custom_jvp in JAX, second call", "JAX", None, "ms"),
]
GOALS = {("mace", 8): 7.0, ("mace", 64): 9.0}


def child(task: str, *arguments: Any, cache: str | None = None) -> dict[str, float]:
    """Microseconds of a task in a fresh process, and of the whole process.

    Args:
        task: a function of `_latency.py`.
        *arguments: its arguments.
        cache: folder of JAX's persistent cache; None: no cache.

    Raises:
        RuntimeError: the process failed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-W", "ignore", str(CHILD), task, json.dumps(arguments)]
    begun = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    seconds = time.perf_counter() - begun
    if done.returncode:
        raise RuntimeError(f"torchcall: benchmarks: {task}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1]) | {WHOLE: seconds}
    return {key: 1e6 * value for key, value in found.items()}


class Latencies:
    """Runs tasks several times, prints rows with their goals, and adds them to the report."""

    def __init__(self, report: Report, rounds: int) -> None:
        self._report, self._rounds = report, rounds

    def task(
        self, rows: list[Row], task: str, *arguments: Any, cache: str | None = None
    ) -> dict[str, Timing]:
        """Measures a task after one run that is not counted.

        Returns:
            All figures of the task, in µs; empty if `--only` excludes its rows.
        """
        if not any(self._report.options.only in row.case for row in rows):
            return {}
        if not self._report.options.quick or cache is not None:
            child(task, *arguments, cache=cache)
        runs = [child(task, *arguments, cache=cache) for _ in range(self._rounds)]
        found = {key: summarise([run[key] for run in runs], len(runs)) for key in runs[0]}
        for row in rows:
            self.row(row, found[row.key])
        return found

    def row(self, row: Row, timing: Timing) -> None:
        """Prints a figure and adds it to the report."""
        scale = SCALES[row.unit]
        value, spread = scale * timing.us_median, scale * timing.us_iqr
        goal = "" if row.goal is None else f"{row.goal:g} {row.unit}"
        print(f"  {row.case:<56}{value:>9.2f} {row.unit:<3}±{spread:>7.2f}{goal:>9}", flush=True)
        if row.goal is not None:
            self._report.claim(row.case, f"in {row.unit}", value, row.goal)
        self._report.rows.append(
            {
                "case": row.case,
                "method": "torchcall",
                "engine": "fresh process",
                "us_median": max(timing.us_median, 1e-3),  # an excess may be zero
                "us_iqr": timing.us_iqr,
                "n": timing.n,
            }
        )


def whole_step(report: Report) -> None:
    """A step of 500 argon atoms beside the model alone, as in `step_shares.py`."""
    import step_shares
    from _argon import argon_module
    from _shares import NATIVE, STEP, bounds, nested, with_gradients
    from md_loop import CUTOFF, DT

    from torchcall.mliap import TorchMliap

    case = "whole step / model alone, 500 atoms"
    if report.options.only not in case:
        return
    module = argon_module(CUTOFF)
    model = TorchMliap.from_module(module, CUTOFF, requires_grad=False)
    state, constants = step_shares.argon(500)
    state = with_gradients(model, state, constants)
    step = nested(model, state, constants, DT)[STEP]
    alone = bounds(model, module, state, constants)[NATIVE]
    runs = {"a step": step, "the model in a C++ loop": alone}
    for run in runs.values():
        run(2)
    timings = report.time(case, runs, calls=2 if report.options.quick else 100)
    ratio = timings["a step"].us_median / timings["the model in a C++ loop"].us_median
    report.claim(case, "ratio", ratio, 1.12)


def peak_memory(report: Report, n_atoms: int) -> None:
    """Peak memory of a process that allocates and updates a list, beyond imports."""
    from neighbor_list import peak_memory

    case = f"peak memory of the list of {n_atoms} atoms beyond imports"
    if report.options.only not in case:
        return
    mebibytes = peak_memory(n_atoms) - peak_memory(0)
    print(f"  {case:<56}{mebibytes:>9.0f} MiB{'':>8}{'1024 MiB':>9}")
    report.claim(case, "MiB", mebibytes, 1024)


def network(latencies: Latencies, name: str) -> None:
    """From an empty process to 100 steps, torchcall beside ASE."""
    import ase.io
    from _networks import NETWORKS
    from networks import crystal

    found = NETWORKS[name]()
    source = str(found.source)
    found.load("package")  # compiles it, if it is not in the cache
    for repeat in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            atoms = crystal(found, repeat)
            structure, cache = f"{folder}/structure.extxyz", f"{folder}/cache"
            ase.io.write(structure, atoms)
            case = f"empty process to 100 steps of {found.title}, {len(atoms)} atoms"
            goal = GOALS.get((name, len(atoms)))
            ours = "network_torchcall", source, structure
            phases = {
                method: latencies.task([Row(f"{case}, {method}", WHOLE, goal)], *task, cache=kept)
                for method, goal, task, kept in (
                    ("torchcall", goal, ours, None),
                    ("torchcall, JAX's cache warm", goal, ours, cache),
                    ("ASE", None, ("network_ase", name, source, structure), None),
                )
            }
            for method, parts in phases.items():
                listed = [
                    f"{key} {1e-6 * part.us_median:.2f}"
                    for key, part in parts.items()
                    if key != WHOLE
                ]
                if listed:
                    print(f"    {method}, s: {', '.join(listed)}")


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--network", choices=["mace", "sevennet"], help="measure this network")
    arguments.set_defaults(rounds=5)
    return arguments.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Measures, prints, and writes the file."""
    options = options_of(argv)
    report = Report("What a user waits for", options)
    latencies = Latencies(report, 1 if options.quick else options.rounds)
    n_atoms = 2000 if options.quick else 100_000
    print(f"\n  {'':<56}{'median':>9}    {'± IQR':>8}{'goal':>9}")
    if options.network:
        network(latencies, options.network)
        return report.finish()
    latencies.task(IMPORTS, "imports")
    latencies.task(LISTS, "lists", options.quick)
    latencies.task(COLD, "chunks")
    with tempfile.TemporaryDirectory() as folder:
        latencies.task(WARM, "chunks", cache=folder)
    latencies.task(EAGER, "eager")
    big = Row(f"first neighbor_list(...).allocate, {n_atoms} atoms", "allocate many", 1.0)
    latencies.task([big], "big_list", n_atoms)
    peak_memory(report, n_atoms)
    whole_step(report)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
