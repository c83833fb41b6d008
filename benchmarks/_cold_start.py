"""The first steps of molecular dynamics in new processes, for `mlip_md.py`.

As a program it is one such process: it imports, loads the network, and makes the steps. It prints
the seconds since `--begun`, when it was started, after some numbers of steps.
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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ase
    from _harness import Report
    from _networks import Network

EVERY, STEPS, REPEATS, GOAL = 10, 100, 3, 200
CACHE = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""The settings of torchcall's commands."""
Stop = tuple[int, float]
"""Steps, and the seconds from the start of the process to their end."""


def cold_start(report: "Report", network: "Network", name: str, system: "ase.Atoms") -> None:
    """Measures the first steps under ASE and under torchcall's package, one process after another.

    The package is in its cache. XLA's programs are once compiled (a first run of this structure),
    and then found in JAX's cache. Adds to `report.found` the seconds until the first 10 steps are
    done, those of a later step, and the step after which torchcall is ahead of ASE.
    """
    import ase.io
    import numpy as np

    case = f"cold start, {network.title}, {len(system)} atoms"
    network.load("package", threads=1, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        structure = Path(folder) / "structure.extxyz"
        ase.io.write(structure, system)
        common = [name, str(network.source), str(structure)]
        found: dict[str, list[list[Stop]]] = {
            "ASE": [],
            "torchcall, first run": [],
            "torchcall": [],
        }
        for repeat in range(REPEATS):
            cache = {"JAX_COMPILATION_CACHE_DIR": str(Path(folder) / f"programs-{repeat}")} | CACHE
            found["ASE"].append(_process("ase", *common))
            for run in ("torchcall, first run", "torchcall"):
                found[run].append(_process("torchcall", *common, **cache))
    stops = {run: np.median(np.asarray(each), axis=0) for run, each in found.items()}
    steps = stops["ASE"][:, 0]
    print(f"\n{case}, seconds since the start\n  {'steps':<24}" + _numbers(steps, 0))
    results: dict[str, Any] = {}
    for run, each in stops.items():
        print(f"  {run:<24}{_numbers(each[:, 1], 2)}")
        results[run] = {
            "start_s": float(each[0, 1]),
            "step_ms": float(1e3 * (each[-1, 1] - each[1, 1]) / (each[-1, 0] - each[1, 0])),
        }
    slow = results["ASE"]
    for run in ("torchcall, first run", "torchcall"):
        fast = results[run]
        gained = 1e-3 * (slow["step_ms"] - fast["step_ms"])
        ahead = EVERY + max(0.0, (fast["start_s"] - slow["start_s"]) / gained)
        fast["ahead_after"] = ahead if gained > 0 else float("inf")
        report.claim(case, f"{run}: ahead of ASE after steps", fast["ahead_after"], GOAL)
    report.found[case] = results


def compile_time(report: "Report", network: "Network") -> None:
    """Measures the compilation of the package, with empty caches, in this process."""
    case = f"compilation, {network.title}"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHCALL_CACHE"] = f"{folder}/packages"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        begun = time.perf_counter()
        network.load("package", threads=1)
        seconds = time.perf_counter() - begun
    print(f"\n{case}: {seconds:.0f} s")
    report.found[case] = {"package_s": seconds}


def _numbers(values: Any, places: int) -> str:
    return "".join(f"{value:>9.{places}f}" for value in values)


def _process(code: str, *words: str, **environment: str) -> list[Stop]:
    """The stops of one process."""
    command = [sys.executable, "-W", "ignore", __file__, code, *words, "--begun", str(time.time())]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"torchcall: {code}: its process failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _ase(network: str, source: str, structure: str) -> Callable[[int], object]:
    import ase.io
    import ase.md.verlet
    import ase.units

    atoms: Any = ase.io.read(structure)
    if network == "mace":
        from mace.calculators import MACECalculator

        atoms.calc = MACECalculator(model_paths=source, device="cpu", default_dtype="float32")
    else:
        from sevenn.calculator import SevenNetCalculator

        atoms.calc = SevenNetCalculator(source, device="cpu")
    return ase.md.verlet.VelocityVerlet(atoms, timestep=ase.units.fs).run


def _torchcall(_: str, source: str, structure: str) -> Callable[[int], object]:
    import ase.io
    from _codes import torchcall_code

    import torchcall
    from torchcall._command.memory import keep_memory

    keep_memory()
    model = torchcall.models.load(source, engine="package", verbose=False, threads=1)
    atoms: Any = ase.io.read(structure)
    return torchcall_code(model, [atoms], EVERY).run


def main() -> None:
    """One process."""
    arguments = argparse.ArgumentParser()
    for name in ("code", "network", "source", "structure"):
        arguments.add_argument(name)
    arguments.add_argument("--begun", type=float)
    options = arguments.parse_args()
    start = {"ase": _ase, "torchcall": _torchcall}[options.code]
    run = start(options.network, options.source, options.structure)
    stops: list[Stop] = []
    for done in range(EVERY, STEPS + 1, EVERY):
        run(EVERY)
        if done in (EVERY, 2 * EVERY, STEPS // 2, STEPS):
            stops.append((done, time.time() - options.begun))
    print(json.dumps(stops))


if __name__ == "__main__":
    main()
