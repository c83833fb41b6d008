"""The fresh processes of `latency.py`: `python _latency.py TASK JSON` prints seconds as JSON.

Nothing is imported before it is timed or needed.
"""

# pyright: reportMissingImports=false
# The networks are optional.

import json
import sys
import time
from pathlib import Path
from typing import Any

CUTOFF, SKIN = 8.5, 1.0  # Å
NETWORK_SKIN, NETWORK_STEPS = 0.5, 100

Result = dict[str, float]


class Clock:
    """Seconds between its calls."""

    def __init__(self) -> None:
        self._last = time.perf_counter()

    def __call__(self) -> float:
        begun, self._last = self._last, time.perf_counter()
        return self._last - begun


def imports() -> Result:
    """Imports, each after those before it."""
    clock = Clock()
    import jax  # noqa: F401

    result = {"import jax": clock()}
    import torch  # noqa: F401

    result["import torch"] = clock()
    import torchcall

    result["import torchcall"] = clock()
    _ = torchcall.mliap  # imported at its first use
    result["import torchcall.mliap"] = clock()
    return result


def ready() -> None:
    """Imports JAX, torch and torchcall, and starts JAX's client."""
    import jax

    import torchcall.mliap  # noqa: F401

    jax.block_until_ready(jax.numpy.zeros(1) + 1)


def argon() -> Any:
    """Positions, cell, periodicity and system numbers of the demo's 500 atoms, in float32."""
    import ase.io

    from torchcall._command.included import included_file
    from torchcall.mliap import geometry_from_ase

    return geometry_from_ase(ase.io.read(included_file("argon.xyz")))


def neighbors_and_model(geometry: Any) -> tuple[Any, Any]:
    """The argon's list and the demo's potential."""
    import torch
    from _argon import argon_module

    from torchcall.mliap import TorchMliap, neighbor_list

    torch.set_num_threads(1)
    module = argon_module(CUTOFF)
    model = TorchMliap.from_module(module, CUTOFF, requires_grad=False)
    return neighbor_list(CUTOFF, skin=SKIN).allocate(*geometry), model


def lists(quick: bool) -> Result:
    """The first list of 500 atoms, and its update within the skin, per edge."""
    ready()
    from torchcall.mliap import neighbor_list

    geometry = argon()
    clock = Clock()
    neighbors = neighbor_list(CUTOFF, skin=SKIN).allocate(*geometry)
    neighbors.n_edges.block_until_ready()
    result = {"allocate": clock()}
    from neighbor_list import loop

    update = loop(lambda n, x: n.update(x, n.cell), geometry.positions, neighbors, 1e-7)
    update(2)
    calls = 20 if quick else 400
    seconds = sorted(update(calls) for _ in range(5))[2]
    return result | {"update per edge": seconds / calls / int(neighbors.n_edges)}


def big_list(n_atoms: int) -> Result:
    """The first list of many atoms."""
    ready()
    from neighbor_list import SKIN, allocate, disordered

    system = disordered(n_atoms)
    clock = Clock()
    allocate(*system, SKIN).n_edges.block_until_ready()
    return {"allocate many": clock()}


def step_of(model: Any, cell: Any, numbers: Any, masses: Any, dt: float) -> Any:
    """A velocity Verlet step for `run_chunks`; the state is positions, velocities and forces."""
    from torchcall.mliap import AtomGraph, energy_and_gradients

    def step(state: Any, neighbors: Any) -> Any:
        positions, velocities, forces = state
        velocities = velocities + 0.5 * dt * forces / masses
        positions = positions + dt * velocities
        neighbors = neighbors.update(positions, cell)
        graph = AtomGraph.from_neighbors(neighbors, positions, cell, numbers)
        forces = -energy_and_gradients(model, graph).position_gradients
        return (positions, velocities + 0.5 * dt * forces / masses, forces), neighbors

    return step


def chunks() -> Result:
    """The first 50 steps, and the same again without the time of its steps."""
    ready()
    import jax
    import jax.numpy as jnp

    from torchcall.mliap import run_chunks

    geometry = argon()
    neighbors, model = neighbors_and_model(geometry)
    positions, cell = jnp.asarray(geometry.positions), jnp.asarray(geometry.cell)
    numbers = jnp.full(len(positions), 18, jnp.int32)
    step = step_of(model, cell, numbers, 39.948, 0.2)
    state = positions, jnp.zeros_like(positions), jnp.zeros_like(positions)
    clock = Clock()

    def seconds(n_steps: int) -> float:
        clock()
        jax.block_until_ready(run_chunks(step, state, neighbors, n_steps, chunk=50))
        return clock()

    first, again, longer = seconds(50), seconds(50), seconds(200)
    steps = (longer - again) / 3
    return {"run_chunks": first, "run_chunks again, beyond its steps": max(again - steps, 0.0)}


def eager() -> Result:
    """The first and second `value_and_grad` of an energy, outside of `jit`."""
    ready()
    from dataclasses import replace

    import jax
    import jax.numpy as jnp

    from torchcall.mliap import AtomGraph, energy, energy_and_gradients

    geometry = argon()
    neighbors, model = neighbors_and_model(geometry)
    positions, cell = jnp.asarray(geometry.positions), jnp.asarray(geometry.cell)
    numbers = jnp.full(len(positions), 18, jnp.int32)
    graph = AtomGraph.from_neighbors(neighbors, positions, cell, numbers)

    def total(positions: Any) -> Any:
        return energy(model, replace(graph, positions=positions)).sum()

    seconds: list[float] = []
    for _ in range(3):
        clock = Clock()
        jax.block_until_ready(jax.value_and_grad(total)(positions))
        seconds.append(clock())
    squares = jax.custom_jvp(lambda x: jnp.sum(x * x))
    squares.defjvp(lambda x, dx: (jnp.sum(x[0] * x[0]), jnp.sum(2 * x[0] * dx[0])))
    return {
        "value_and_grad, first": seconds[0],
        "value_and_grad, second": min(seconds[1:]),
        "energy_and_gradients": later(lambda: energy_and_gradients(model, graph)),
        "JAX": later(lambda: jax.value_and_grad(squares)(positions)),
    }


def later(call: Any) -> float:
    """Seconds of a call that is not the first."""
    import jax

    seconds: list[float] = []
    for _ in range(3):
        clock = Clock()
        jax.block_until_ready(call())
        seconds.append(clock())
    return min(seconds[1:])


def network_torchcall(source: str, structure: str) -> Result:
    """100 steps of a network's package through `run_chunks`, from an empty process."""
    clock = Clock()
    import ase.io
    import ase.units
    import jax
    import jax.numpy as jnp
    import torch

    result = {"import ase, jax, torch": clock()}
    torch.set_num_threads(1)
    import torchcall
    from torchcall import models
    from torchcall.mliap import geometry_from_ase, neighbor_list, run_chunks

    torchcall.set_num_threads(1)
    result["import torchcall"] = clock()
    model = models.load(source, engine="package", verbose=False)
    result["load"] = clock()
    atoms: Any = ase.io.read(structure)
    geometry = geometry_from_ase(atoms)
    cutoff = float(model.cutoff.data[0])
    neighbors = neighbor_list(cutoff, skin=NETWORK_SKIN).allocate(*geometry)
    neighbors.n_edges.block_until_ready()
    result["allocate"] = clock()
    positions, cell = jnp.asarray(geometry.positions), jnp.asarray(geometry.cell)
    masses = jnp.asarray(atoms.get_masses()[:, None], jnp.float32)
    step = step_of(model, cell, jnp.asarray(atoms.numbers), masses, ase.units.fs)
    velocities = jnp.asarray(atoms.get_velocities(), jnp.float32)
    state = positions, velocities, jnp.zeros_like(positions)
    run = [*run_chunks(step, state, neighbors, NETWORK_STEPS, chunk=NETWORK_STEPS)]
    jax.block_until_ready(run)
    return result | {"run": clock()}


def network_ase(network: str, source: str, structure: str) -> Result:
    """100 steps of a network's own ASE calculator, from an empty process."""
    clock = Clock()
    import ase.io
    import ase.md.verlet
    import ase.units
    import torch

    result = {"import ase, torch": clock()}
    torch.set_num_threads(1)
    calculator: Any
    if network == "mace":
        from mace.calculators import MACECalculator

        result["import network"] = clock()
        calculator = MACECalculator(model_paths=source, device="cpu", default_dtype="float32")
    else:
        from sevenn.calculator import SevenNetCalculator

        result["import network"] = clock()
        calculator = SevenNetCalculator(source, device="cpu")
    result["load"] = clock()
    atoms: Any = ase.io.read(structure)
    atoms.calc = calculator
    ase.md.verlet.VelocityVerlet(atoms, timestep=ase.units.fs).run(NETWORK_STEPS)
    return result | {"run": clock()}


def main() -> None:
    """Runs one task."""
    name, arguments = sys.argv[1], json.loads(sys.argv[2])
    for finder in sys.meta_path:
        # As from a wheel: an editable install would first look for changed C++ files.
        if hasattr(finder, "rebuild_flag"):
            setattr(finder, "rebuild_flag", False)  # noqa: B010
    sys.path.insert(0, str(Path(__file__).parent))
    print(json.dumps(globals()[name](*arguments)))


if __name__ == "__main__":
    main()
