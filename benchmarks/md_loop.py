"""µs per step of NVE molecular dynamics in one jitted scan, at three sizes.

    python benchmarks/md_loop.py --json benchmarks/results/md_loop.json

A step moves liquid argon by velocity Verlet, updates the neighbour list, and calls a TorchScript
Lennard-Jones potential, by each of the methods. Every run starts from the same state and makes the
same number of steps, so all of them search for neighbours equally often. The two torch loops call
only the potential: torch's own share of a step. The recorded figures are for one torch thread
(OMP_NUM_THREADS=1).

Then `torchcall.mliap`: a graph with and without spare slots; 64 systems in one call of the model
and in 64 calls. Last, a call and a step of the same potential through TorchScript, eager torch and
AOTInductor. `step_shares.py` has the parts of a step.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import _engines
import jax.numpy as jnp
import numpy as np
from _argon import Structure, argon_module, read_argon, thermal_velocities
from _dynamics import Constants, State, compiled_runs, graph_of, start, with_gradients
from _harness import (
    FLOOR,
    PYTHON,
    TORCHCALL,
    Problem,
    Report,
    Run,
    liquid,
    parser,
    peers,
    python_loop,
    torchcall_wrapper,
)
from _native_loop import script_loop
from _potentials import batched, narrowing
from ase import units

from torchcall.mliap._input import input_dtypes, output_specs

CUTOFF, SKIN, DT, TEMPERATURE = 8.5, 1.0, 2.0 * units.fs, 94.4


def structure(n_atoms: int) -> Structure:
    """Liquid argon: the included 500 atoms, copies of them, or a distorted lattice of n³ atoms."""
    argon = read_argon(temperature=TEMPERATURE, seed=0)
    copies = round((n_atoms / len(argon.positions)) ** (1 / 3))
    if n_atoms == 500 * copies**3:
        shifts = np.stack(np.meshgrid(*[np.arange(copies)] * 3, indexing="ij"), -1).reshape(-1, 3)
        positions = (argon.positions[None] + (shifts @ argon.cell)[:, None]).reshape(-1, 3)
        cell = argon.cell * copies
    else:
        positions, cell = liquid(n_atoms)
    masses = np.full(n_atoms, argon.masses[0])
    return Structure(
        name=f"{n_atoms} argon atoms",
        formula=f"Ar{n_atoms}",
        positions=positions,
        velocities=thermal_velocities(masses, units.kB * TEMPERATURE, seed=0),
        atomic_numbers=np.full(n_atoms, argon.atomic_numbers[0]),
        masses=masses,
        cell=cell,
        pbc=argon.pbc,
    )


def loops(
    problem: Problem, state: State, constants: Constants, n_steps: int, without: list[str]
) -> dict[str, Run]:
    """A compiled run of `n_steps` steps for every method, and loops of the potential alone."""
    wrapper = torchcall_wrapper(problem)
    state = with_gradients(wrapper, state, constants, CUTOFF)
    models: dict[str, Any] = {TORCHCALL: wrapper}
    for name, make in peers(without).items():
        models[name] = make(problem.module, **problem.options())
    tensors = problem.tensors()
    runs: dict[str, Run] = {
        f"{FLOOR}, forward only": script_loop(problem.module, tensors, requires_grad=False),
        f"{PYTHON}, forward only": python_loop(problem.module, tensors, requires_grad=False),
    }
    runs |= compiled_runs(models, state, constants, n_steps, cutoff=CUTOFF, dt=DT)
    for run in runs.values():
        run(n_steps)
    return runs


def main(argv: list[str] | None = None) -> int:
    """Times the loop at each size."""
    options = parser(__doc__ or "").parse_args(argv)
    report = Report("Molecular dynamics in one jitted scan", options)
    module = argon_module(CUTOFF)
    for n_atoms, n_steps in ((64, 400), (500, 100), (4000, 25)):
        case = f"md, {n_atoms} atoms"
        if options.only not in case or (options.quick and n_atoms != 64):
            continue
        n_steps = 3 if options.quick else n_steps
        state, constants = start(structure(n_atoms), cutoff=CUTOFF, skin=SKIN, dtype=jnp.float32)
        graph = graph_of(state.positions, state.neighbors, constants, CUTOFF)
        spec = (input_dtypes(),)
        problem = Problem(case, module, (graph,), output_specs, input_spec=spec)
        runs = loops(problem, state, constants, n_steps, options.without)
        report.time(case, runs, calls=n_steps, most_rounds=21)
    if options.only in "narrowing" and not options.quick:
        for n_atoms in (512, 4096):
            narrowing(report, n_atoms)
    if options.only in "batched" and not options.quick:
        batched(report, 64)
    if options.only in "engines" and not options.quick:
        with tempfile.TemporaryDirectory() as folder:
            _engines.calls(report, Path(folder))
            for n_atoms in (64, 500):
                begun = start(structure(n_atoms), cutoff=CUTOFF, skin=SKIN, dtype=jnp.float32)
                _engines.steps(report, Path(folder), *begun, CUTOFF, DT)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
