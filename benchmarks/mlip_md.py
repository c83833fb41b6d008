"""`torchcall md` against ASE's VelocityVerlet, and what its files cost per step.

Constant energy, one torch thread, single precision: 500 argon atoms of the demo and 8 NaCl atoms
under SevenNet-0 (`--network`, in an environment that has it). The command runs as it is: records of
`--every` steps with a row of the log and a frame of the trajectory. "loop alone" is one jitted loop
over the same steps and model, with nothing written.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ase
import ase.build
import ase.io
import jax
import numpy as np
from _harness import Report, parser
from ase import units
from ase.md.verlet import VelocityVerlet

from torchcall._command import md
from torchcall._command.included import included_file
from torchcall._command.memory import keep_memory
from torchcall._command.parsing import Parser
from torchcall.demo._timing import Run as TimedRun
from torchcall.demo._timing import timed
from torchcall.integrations.ase import Calculator
from torchcall.md.process import process_settings
from torchcall.md.progress import Progress
from torchcall.md.run import Run

LOOP, OURS, NATIVE = "loop alone", "ASE, torchcall's calculator", "ASE, SevenNet's calculator"
EVERY = (10, 100)


def command(folder: Path, structure: Path, every: int, *options: str) -> Run:
    """A run of `torchcall md` before its first step."""
    words = ["--structure", str(structure), "--temperature", "90", "--threads", "1", *options]
    files = ["--log", str(folder / f"{every}.csv"), "--traj", str(folder / f"{every}.extxyz")]
    arguments = Parser("md", "")
    md.add_options(arguments)
    parsed = arguments.parse_args([*words, *files, "--every", str(every), "--steps", str(10**8)])
    md.check(parsed)
    return Run(parsed)


def records(run: Run, pool: Any, bar: Progress) -> TimedRun:
    """Steps of the command, with rows, frames and progress bar."""

    def steps(calls: int) -> None:
        for _ in range(calls // run.options.every):
            run.record(pool)
            bar.show(run.step, run.done.frame)

    return lambda calls: timed(lambda: steps(calls))


def loop(run: Run) -> TimedRun:
    """Steps of the command's own loop, as one record of any length."""
    simulation, state = run.simulation_of(run.model), [run.done.groups[0]]

    def steps(calls: int) -> None:
        state[0] = simulation.advance(state[0])
        jax.block_until_ready(state[0].state)
        assert calls == simulation.every

    return lambda calls: timed(lambda: steps(calls))


def ase_loop(atoms: ase.Atoms, calculator: Any, timestep: float) -> TimedRun:
    """Steps of ASE's VelocityVerlet."""
    atoms = atoms.copy()
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, timestep=timestep)
    return lambda calls: timed(lambda: dynamics.run(calls))


def measure(
    report: Report, title: str, atoms: ase.Atoms, calculators: dict[str, Callable[[Run], Any]],
    *options: str,
) -> None:  # fmt: skip
    """Measures one structure and model."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as pool:
        folder = Path(name)
        structure = folder / "structure.extxyz"
        ase.io.write(structure, atoms)
        runs = {every: command(folder, structure, every, *options) for every in EVERY}
        longest = runs[max(EVERY)]
        methods: dict[str, TimedRun] = {LOOP: loop(longest)}
        with Progress(0, 10**8, 2.0, len(atoms)) as bar:
            for every, run in runs.items():
                methods[f"torchcall md, --every {every}"] = records(run, pool, bar)
            for label, make in calculators.items():
                methods[label] = ase_loop(atoms, make(longest), 2.0 * units.fs)
            for run in methods.values():
                run(max(EVERY))
            engines = {NATIVE: "eager"}
            timings = report.time(title, methods, calls=max(EVERY), engines=engines)
        begun = time.perf_counter()
        longest.save()
        print(f"  a checkpoint takes {1e3 * (time.perf_counter() - begun):.1f} ms (every 10 s)")
        for every in EVERY:
            share = timings[f"torchcall md, --every {every}"].us_median / timings[LOOP].us_median
            report.claim(title, f"--every {every} / loop alone", share, 1.05)
        best = timings[f"torchcall md, --every {max(EVERY)}"].us_median
        for label in calculators:
            ratio = timings[label].us_median / best
            report.claim(title, f"{label} / torchcall md", ratio, 1.0, at_most=False)


def main() -> int:
    """Measures, prints, and writes the file."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--network", action="store_true", help="7net-0 in place of argon")
    arguments.set_defaults(rounds=11)
    options = arguments.parse_args()
    keep_memory()  # as the command
    report = Report("torchcall md and ASE", options)
    settings = Parser("md", "")
    md.add_options(settings)
    with process_settings(settings.parse_args(["--threads", "1"])):
        ours: dict[str, Callable[[Run], Any]] = {OURS: lambda run: Calculator(run.model)}
        if options.network:
            from sevenn.calculator import SevenNetCalculator  # pyright: ignore

            salt = ase.build.bulk("NaCl", "rocksalt", a=5.64, cubic=True)
            salt.rattle(0.03, rng=np.random.default_rng(0))
            ours[NATIVE] = lambda _: SevenNetCalculator("7net-0", device="cpu")
            measure(report, "7net-0, 8 NaCl atoms", salt, ours, "--model", "7net-0")
        else:
            argon: Any = ase.io.read(included_file("argon.xyz"))
            measure(report, "argon, 500 atoms", argon, ours)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
