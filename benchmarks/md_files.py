"""What the files of `torchcall md` cost per step, beside ASE's VelocityVerlet.

Constant energy, one torch thread, single precision: the demo's 500 argon atoms, because beside a
network files cost nothing. The command runs as it is: records of `--every` steps with a row of the
log and a frame of the trajectory. "loop alone" is one jitted loop over the same steps and model,
with nothing written.
"""

import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ase
import ase.io
import jax
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

LOOP, OURS = "loop alone", "ASE, torchcall's calculator"
EVERY = (10, 100)


def command(folder: Path, structure: Path, every: int) -> Run:
    """A run of `torchcall md` before its first step."""
    words = ["--structure", str(structure), "--temperature", "90", "--threads", "1"]
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


def measure(report: Report, title: str, atoms: ase.Atoms) -> None:
    """Measures one structure under the demo's potential."""
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as pool:
        folder = Path(name)
        structure = folder / "structure.extxyz"
        ase.io.write(structure, atoms)
        runs = {every: command(folder, structure, every) for every in EVERY}
        longest = runs[max(EVERY)]
        methods: dict[str, TimedRun] = {LOOP: loop(longest)}
        with Progress(0, 10**8, 2.0, len(atoms)) as bar:
            for every, run in runs.items():
                methods[f"torchcall md, --every {every}"] = records(run, pool, bar)
            methods[OURS] = ase_loop(atoms, Calculator(longest.model), 2.0 * units.fs)
            for run in methods.values():
                run(max(EVERY))
            timings = report.time(title, methods, calls=max(EVERY))
        begun = time.perf_counter()
        longest.save()
        print(f"  a checkpoint takes {1e3 * (time.perf_counter() - begun):.1f} ms (every 10 s)")
        for every in EVERY:
            share = timings[f"torchcall md, --every {every}"].us_median / timings[LOOP].us_median
            report.claim(title, f"--every {every} / loop alone", share, 1.05)
        ratio = timings[OURS].us_median / timings[f"torchcall md, --every {max(EVERY)}"].us_median
        report.claim(title, f"{OURS} / torchcall md", ratio, 1.0, at_most=False)


def main() -> int:
    """Measures, prints, and writes the file."""
    arguments = parser(__doc__ or "")
    arguments.set_defaults(rounds=41)
    options = arguments.parse_args()
    keep_memory()  # as the command
    report = Report("torchcall md and ASE", options)
    settings = Parser("md", "")
    md.add_options(settings)
    with process_settings(settings.parse_args(["--threads", "1"])):
        argon: Any = ase.io.read(included_file("argon.xyz"))
        measure(report, "argon, 500 atoms", argon)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
