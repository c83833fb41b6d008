"""Where each microsecond of a step of molecular dynamics goes, from 8 to 32 000 atoms.

    OMP_NUM_THREADS=1 python benchmarks/step_shares.py --json benchmarks/results/step_shares.json

A velocity Verlet step in one jitted loop: neighbour list, padded graph, call of the model. Liquid
argon with the demo's TorchScript Lennard-Jones potential, and crystals with the package of 7net-0
(of a Lennard-Jones potential where SevenNet is not installed). The parts are nested, and a share is
the difference of two, so the shares add up to a step. Beside them, in the same rounds: the call
alone, the model in a C++ loop, and a copy of the bytes that a step must write.

"remainder" is what a call costs inside a step beyond the same call alone, mostly cold caches. The
lower bound is the model in the C++ loop and the copy.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ase
import jax.numpy as jnp
import numpy as np
import torch
from _harness import Report, parser
from _shares import (
    ALONE,
    CALL,
    GRAPH,
    INTEGRATOR,
    LIST,
    LOOP,
    MEMCPY,
    NATIVE,
    STEP,
    bounds,
    exact_graph,
    nested,
    with_gradients,
)
from ase import units
from md_loop import CUTOFF, DT, SKIN, structure

import torchcall.mliap
from torchcall.demo._dynamics import Constants, State, start
from torchcall.demo._potential import load_potential
from torchcall.demo._system import Structure, load_example
from torchcall.demo._timing import Timing
from torchcall.mliap import TorchMliap

SIZES = (8, 64, 500, 4000, 32_000)
NETWORK_REPEATS = (1, 2, 4)  # 8, 64 and 512 atoms
NETWORK_SKIN, NETWORK_DT = 0.5, 1.0 * units.fs
ENGINES = {LOOP: "XLA", INTEGRATOR: "XLA", MEMCPY: "none"}


def shares(timings: dict[str, Timing]) -> dict[str, float]:
    """µs of each part of a step. They add up to the step."""
    us = {name: timing.us_median for name, timing in timings.items()}
    return {
        "model, in a C++ loop": us[NATIVE],
        "call: bridge, casts, checks": us[ALONE] - us[NATIVE],
        "graph and padding": us[GRAPH] - us[CALL],
        "list within its skin": us[LIST] - us[GRAPH],
        "searches": us[STEP] - us[LIST],
        "integrator": us[INTEGRATOR] - us[LOOP],
        "loop": us[LOOP],
        "remainder": us[CALL] - us[INTEGRATOR] - us[ALONE],
    }


def measure(
    report: Report,
    case: str,
    model: TorchMliap,
    module: torch.jit.ScriptModule | None,
    begun: tuple[State, Constants],
    dt: float,
) -> None:
    """Times one system and prints the shares."""
    state, constants = begun
    state = with_gradients(model, state, constants)
    n_atoms = len(state.positions)
    edges = exact_graph(model.cutoff, state, constants)["edge_index"].shape[1]
    runs = nested(model, state, constants, dt) | bounds(model, module, state, constants)
    for run in runs.values():
        run(2)
    n_steps = 2 if report.options.quick else int(np.clip(2 / runs[STEP](2), 2, 400))
    if module is not None and not report.options.quick:
        n_steps = max(n_steps, 40)  # steps after which the skin has been used up
    engine = "AOTInductor" if module is None else "TorchScript"
    timings = report.time(
        f"{case}, {n_atoms} atoms, {edges} edges",
        runs,
        calls=n_steps,
        most_rounds=15 if n_atoms < 2000 and (module is not None or n_atoms < 100) else 5,
        engines=dict.fromkeys(runs, engine) | ENGINES,
    )
    step = timings[STEP].us_median
    print(f"\n  {'share of a step':<34}{'µs':>12}{'%':>8}")
    for name, us in (found := shares(timings)).items():
        print(f"  {name:<34}{us:>12.2f}{100 * us / step:>8.1f}")
    print(f"  {'sum, a step':<34}{sum(found.values()):>12.2f}{100.0:>8.1f}")
    bound = timings[NATIVE].us_median + timings[MEMCPY].us_median
    print(f"  {'lower bound':<34}{bound:>12.2f}{100 * bound / step:>8.1f}")
    ratio = step / timings[NATIVE].us_median
    report.claim(f"{case}, {n_atoms} atoms", "a step / the model in a C++ loop", ratio, 1.12)


def argon(n_atoms: int) -> tuple[State, Constants]:
    """Liquid argon, with its neighbour list."""
    return start(structure(n_atoms), cutoff=CUTOFF, skin=SKIN, dtype=jnp.float32)


def lennard_jones(report: Report) -> None:
    """The demo's potential at all sizes."""
    module = load_potential(None, CUTOFF).module
    model = TorchMliap.from_module(module, CUTOFF, requires_grad=False)
    for n_atoms in SIZES:
        case = f"Lennard-Jones, {n_atoms} atoms"
        if report.options.only in case and (n_atoms == 64 or not report.options.quick):
            measure(report, "Lennard-Jones", model, module, argon(n_atoms), DT)


def sevennet(report: Report) -> None:
    """The package of 7net-0, compiled once into the cache."""
    from _networks import NETWORKS
    from networks import crystal

    network = NETWORKS["sevennet"]()
    model: Any = None
    for repeat in NETWORK_REPEATS:
        if report.options.only not in f"{network.title}, {8 * repeat**3} atoms":
            continue
        model = model or network.load("package", verbose=False)
        cutoff = float(model.cutoff.data[0])
        begun = start(
            of_atoms(crystal(network, repeat)), cutoff=cutoff, skin=NETWORK_SKIN, dtype=jnp.float32
        )
        measure(report, network.title, model, None, begun, NETWORK_DT)


def of_atoms(atoms: ase.Atoms) -> Structure:
    """ASE's atoms as the demo's structure."""
    formula = atoms.get_chemical_formula()
    return Structure(
        name=formula,
        formula=formula,
        positions=atoms.positions,
        velocities=atoms.get_velocities(),
        atomic_numbers=atoms.numbers,
        masses=atoms.get_masses(),
        cell=np.asarray(atoms.cell),
        pbc=atoms.pbc,
    )


def lennard_jones_package(report: Report, folder: Path) -> None:
    """A package of a Lennard-Jones potential that differentiates by autograd, as networks do."""
    module = load_example("lennard_jones").LennardJones(cutoff=CUTOFF, autograd=True).eval()
    model: Any = None
    for n_atoms in SIZES[:3]:
        if report.options.only not in f"Lennard-Jones package, {n_atoms} atoms":
            continue
        begun = argon(n_atoms)
        if model is None:
            path = folder / "lennard_jones.pt2"
            example = exact_graph(CUTOFF, *begun)
            torchcall.mliap.compile(module, path, example=example, cutoff=CUTOFF)
            model = TorchMliap.from_package(path)
        measure(report, "Lennard-Jones package", model, None, begun, DT)


def main(argv: list[str] | None = None) -> int:
    """Times every size."""
    options = parser(__doc__ or "").parse_args(argv)
    report = Report("Shares of a step of molecular dynamics", options)
    lennard_jones(report)
    if options.quick:
        return report.finish()
    if find_spec("sevenn") is not None:
        sevennet(report)
    else:
        with tempfile.TemporaryDirectory() as folder:
            lennard_jones_package(report, Path(folder))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
