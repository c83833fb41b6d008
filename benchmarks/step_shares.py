"""Where each microsecond of a step of molecular dynamics goes, from 8 to 32 000 atoms.

    OMP_NUM_THREADS=1 python benchmarks/step_shares.py --json benchmarks/results/step_shares.json

A velocity Verlet step in one jitted loop: neighbour list, padded graph, call of the model. Liquid
argon with TorchScript Lennard-Jones potentials, by formulas as in the demo and with autograd, and
crystals with the package of 7net-0 (of a Lennard-Jones potential where SevenNet is not installed).

The parts are nested, and a share is the difference of two, so the shares add up to a step. Beside
them, in the same rounds: the call alone, the model in a C++ loop, and a copy of the bytes that a
step must write. Shares are those of the least times: other programs only add to a time.

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
from _argon import Structure, argon_module
from _dynamics import Constants, State, start
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
from torchcall._command.included import load_example
from torchcall.demo._timing import Timing
from torchcall.mliap import TorchMliap

SIZES = (8, 64, 500, 4000, 32_000)
SECONDS = 15  # per size
NETWORK_REPEATS = (1, 2, 4)  # 8, 64 and 512 atoms
NETWORK_SKIN, NETWORK_DT = 0.5, 1.0 * units.fs
ENGINES = {LOOP: "XLA", INTEGRATOR: "XLA", MEMCPY: "none"}


def shares(timings: dict[str, Timing]) -> dict[str, float]:
    """µs of each part of a step, from the least times. They add up to the step."""
    us = {name: timing.us_least for name, timing in timings.items()}
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
    requires_grad: bool = False,
) -> None:
    """Times one system and prints the shares."""
    state, constants = begun
    state = with_gradients(model, state, constants)
    n_atoms = len(state.positions)
    edges = exact_graph(model.cutoff, state, constants)["edge_index"].shape[1]
    runs = nested(model, state, constants, dt) | bounds(
        model, module, state, constants, requires_grad
    )
    for run in runs.values():
        run(2)
    step = runs[STEP](2) / 2
    # Samples are short and many: on shared cores their speed changes within seconds. After 40 steps
    # the skin of the liquid has been used up; a crystal's lasts longer.
    fewest = 2 if module is None else 40
    n_steps = 2 if report.options.quick else max(fewest, round(0.1 / step))
    most_rounds = int(np.clip(SECONDS / (len(runs) * n_steps * step), 3, 60))
    engine = "AOTInductor" if module is None else "TorchScript"
    timings = report.time(
        f"{case}, {n_atoms} atoms, {edges} edges",
        runs,
        calls=n_steps,
        most_rounds=most_rounds,
        engines=dict.fromkeys(runs, engine) | ENGINES,
    )
    least = {name: timing.us_least for name, timing in timings.items()}
    found = shares(timings)
    found |= {"sum, a step": sum(found.values()), "lower bound": least[NATIVE] + least[MEMCPY]}
    print(f"\n  {'share of a step':<34}{'µs':>12}{'%':>8}")
    for name, us in found.items():
        print(f"  {name:<34}{us:>12.2f}{100 * us / least[STEP]:>8.1f}")
        report.rows.append(
            {
                "case": f"share of a step: {case}, {n_atoms} atoms",
                "method": name,
                "engine": engine,
                "us_median": max(us, 1e-3),  # a share below the noise may be negative
                "us_iqr": 0.0,
                "n": timings[STEP].n,
            }
        )
    ratio = least[STEP] / least[NATIVE]
    report.claim(f"{case}, {n_atoms} atoms", "a step / the model in a C++ loop", ratio, 1.12)


def argon(n_atoms: int) -> tuple[State, Constants]:
    """Liquid argon, with its neighbour list."""
    return start(structure(n_atoms), cutoff=CUTOFF, skin=SKIN, dtype=jnp.float32)


def lennard_jones(report: Report) -> None:
    """The demo's potential, by formulas, at all sizes; and with autograd, as networks do."""
    by_formulas = argon_module(CUTOFF)
    with_autograd = torch.jit.script(
        load_example("lennard_jones").LennardJones(cutoff=CUTOFF, autograd=True).eval()
    )
    for title, module, requires_grad, sizes in (
        ("Lennard-Jones", by_formulas, False, SIZES),
        ("Lennard-Jones with autograd", with_autograd, True, SIZES[:3]),
    ):
        model = TorchMliap.from_module(module, CUTOFF, requires_grad=requires_grad)
        for n_atoms in sizes:
            quick = title == "Lennard-Jones" and n_atoms == 64
            if report.options.only in f"{title}, {n_atoms} atoms" and (
                quick or not report.options.quick
            ):
                measure(report, title, model, module, argon(n_atoms), DT, requires_grad)


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
    arguments = parser(__doc__ or "")
    arguments.set_defaults(rounds=60)
    options = arguments.parse_args(argv)
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
