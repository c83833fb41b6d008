"""Trained networks: their own ASE calculators against torchcall's engines.

For 8, 64 and 216 atoms and each number of threads: a call (energy, forces and cell gradients at
given edges; the calculator makes its own list in each call), and a step of molecular dynamics (NVE,
neighbour list included: ASE's `VelocityVerlet` against one jitted scan). Run it in the environment
of the network, which `make bench-networks` does.
"""

# pyright: reportMissingImports=false
# The networks are optional.

import sys
from collections.abc import Callable
from typing import Any

import ase
import ase.build
import ase.md.verlet
import ase.units
import jax
import jax.numpy as jnp
import numpy as np
import torch
from _engines import call_loop
from _harness import BUFFER, Report, jitted_loop, parser
from _networks import NETWORKS, Network

import torchcall
from torchcall.demo._peers import CallCounter, buffer_callback_call
from torchcall.demo._timing import Run, timed
from torchcall.mliap import (
    AtomGraph,
    TorchMliap,
    energy_and_gradients,
    geometry_from_ase,
    neighbor_list,
    pad_graph,
)
from torchcall.mliap._input import input_dtypes, output_specs

ASE = "ASE calculator"
ENGINES = {"eager": "eager", "script": "TorchScript", "package": "AOTInductor"}
SKIN = 0.5  # Å
STEP = 1.0 * ase.units.fs


def crystal(network: Network, repeat: int) -> ase.Atoms:
    """8 `repeat`³ atoms near the sites of the network's crystal, with velocities for 300 K."""
    atoms = network.cell() * (repeat, repeat, repeat)
    rng = np.random.default_rng(0)
    atoms.positions += rng.normal(scale=0.03, size=atoms.positions.shape)
    masses = atoms.get_masses()[:, None]
    atoms.set_momenta(rng.normal(size=(*masses.shape[:1], 3)) * np.sqrt(masses * 0.02585))
    return atoms


def models(network: Network) -> dict[str, TorchMliap]:
    """The network through each engine that it supports."""
    return {
        f"torchcall, {ENGINES[engine]}": network.load(engine, verbose=False)
        for engine in network.engines
    }


def graph_of(
    model: TorchMliap, atoms: ase.Atoms, skin: float, slack: float
) -> tuple[AtomGraph, Any]:
    """The atoms' graph and neighbour list, in float32, with `slack` times as many edge slots."""
    geometry = geometry_from_ase(atoms)
    cutoff = float(model.cutoff.data[0])
    search = neighbor_list(cutoff, skin=skin, capacity_multiplier=slack)
    neighbors = search.allocate(*geometry)
    positions, cell = jnp.asarray(geometry.positions), jnp.asarray(geometry.cell)
    numbers = jnp.asarray(atoms.numbers)
    return AtomGraph.from_neighbors(neighbors, positions, cell, numbers), neighbors


def call_runs(network: Network, loaded: dict[str, TorchMliap], atoms: ase.Atoms) -> dict[str, Run]:
    """Loops of calls, compiled and warm."""
    system = atoms.copy()
    system.calc = network.calculator()

    def calculator(calls: int) -> None:
        for _ in range(calls):
            system.positions[0, 0] += 1e-6  # otherwise ASE returns the last results
            system.get_forces()
            system.get_stress()

    runs: dict[str, Run] = {ASE: lambda calls: timed(lambda: calculator(calls))}
    first = next(iter(loaded.values()))
    graph, _ = graph_of(first, atoms, 0.0, 1.0)
    padded, _ = pad_graph(graph, cutoff=first.cutoff)
    for name, model in loaded.items():
        runs[name] = call_loop(model, padded)
    eager = loaded.get(f"torchcall, {ENGINES['eager']}")
    if eager is not None:
        counter = CallCounter()
        call = buffer_callback_call(
            eager.wrapper._inspected(),
            counter=counter,
            input_spec=(input_dtypes(),),
            output_spec=lambda graph: output_specs(graph, compute_cell_gradients=True),
            requires_grad=True,
        )
        runs[BUFFER] = jitted_loop(call, (padded,), lambda: counter.calls)
    return runs


def step_runs(network: Network, loaded: dict[str, TorchMliap], atoms: ase.Atoms) -> dict[str, Run]:
    """Loops of steps of molecular dynamics, compiled and warm."""
    system = atoms.copy()
    system.calc = network.calculator()
    dynamics = ase.md.verlet.VelocityVerlet(system, timestep=STEP)
    runs: dict[str, Run] = {ASE: lambda calls: timed(lambda: dynamics.run(calls))}
    runs.update({name: dynamics_loop(model, atoms) for name, model in loaded.items()})
    return runs


def dynamics_loop(model: TorchMliap, atoms: ase.Atoms) -> Run:
    """`run(steps)`: one jitted loop; the list is rebuilt when an atom has moved by half the skin.

    Raises:
        RuntimeError: the list overflowed.
    """
    graph, neighbors = graph_of(model, atoms, SKIN, 1.25)
    cell, numbers = graph.cell, graph.atomic_numbers
    masses = jnp.asarray(atoms.get_masses()[:, None], jnp.float32)

    @jax.jit
    def loop(steps: Any, model: TorchMliap, carry: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            positions, velocities, forces, neighbors = carry
            velocities = velocities + 0.5 * STEP * forces / masses
            positions = positions + STEP * velocities
            neighbors = neighbors.update(positions, cell)
            graph = AtomGraph.from_neighbors(neighbors, positions, cell, numbers)
            forces = -energy_and_gradients(model, graph).position_gradients
            return positions, velocities + 0.5 * STEP * forces / masses, forces, neighbors

        return jax.lax.fori_loop(0, steps, body, carry)

    forces = -jax.jit(energy_and_gradients)(model, graph).position_gradients
    velocities = jnp.asarray(atoms.get_velocities(), jnp.float32)
    state = [(graph.positions, velocities, forces, neighbors)]

    def steps(number: int) -> None:
        state[0] = jax.block_until_ready(loop(number, model, state[0]))
        if bool(state[0][3].did_overflow):
            raise RuntimeError("torchcall: expected a neighbour list that fits, got an overflow")

    return lambda number: timed(lambda: steps(number))


def measure(report: Report, network: Network, sizes: list[int], threads: int) -> None:
    """Measures one network with a number of threads."""
    torch.set_num_threads(threads)
    torchcall.set_num_threads(threads)
    loaded = models(network)
    engines = {name: name.removeprefix("torchcall, ") for name in loaded}
    engines |= {ASE: "eager", BUFFER: "eager"}
    kinds: dict[str, Callable[..., dict[str, Run]]] = {"call": call_runs, "step": step_runs}
    for repeat in sizes:
        atoms = crystal(network, repeat)
        for kind, make in kinds.items():
            case = f"{network.title}, {len(atoms)} atoms, threads: {threads}, {kind}"
            if report.options.only not in case:
                continue
            runs = make(network, loaded, atoms)
            for run in runs.values():
                run(2)
            timings = report.time(case, runs, engines=engines)
            if kind == "step":
                ratios = [timings[ASE].us_median / timings[name].us_median for name in loaded]
                report.claim(case, "ASE / the best engine", max(ratios), 1.5, at_most=False)
                report.claim(case, "ASE / the slowest engine", min(ratios), 1.0, at_most=False)


def main() -> int:
    """Measures, prints, and writes the file."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--network", choices=sorted(NETWORKS), required=True)
    arguments.add_argument("--threads", type=int, nargs="+", default=[1], help="of torch")
    arguments.add_argument(
        "--repeat", type=int, nargs="+", default=[1, 2, 3], help="8 n³ atoms (default: 1 2 3)"
    )
    options = arguments.parse_args()
    report = Report(f"{options.network}: ASE and torchcall", options)
    for threads in options.threads:
        measure(report, NETWORKS[options.network](), options.repeat, threads)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
