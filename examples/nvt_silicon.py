"""Langevin dynamics of a batch of silicon cells, each at its own temperature.

    python examples/nvt_silicon.py            # some seconds; needs ase and tqdm

The potential is Stillinger–Weber in TorchScript (`stillinger_weber.py`), as a function of a state
with particles, systems, a neighbour list and a model. The integrator is BAOAB (B. Leimkuhler and
C. Matthews, J. Chem. Phys. 138, 174102 (2013), https://doi.org/10.1063/1.4802990). All steps run in
compiled chunks.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ase import units
from ase.build import bulk
from stillinger_weber import StillingerWeber
from tqdm import tqdm

from torchcall.mliap import (
    Index,
    NeighborList,
    ParticleId,
    SystemId,
    Table,
    TorchMliap,
    geometry_from_ase,
    make_torch_mliap_from_state,
    neighbor_list,
    run_chunks,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Particles:
    """Atoms, in Å, ASE's unit of time and atomic mass units."""

    positions: jax.Array
    velocities: jax.Array
    masses: jax.Array
    atomic_numbers: jax.Array
    system: Index[SystemId]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Systems:
    """Cells in Å, thermal energies in eV."""

    cell: jax.Array
    pbc: jax.Array
    thermal_energy: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """The state of potential and integrator."""

    particles: Table[ParticleId, Particles]
    systems: Table[SystemId, Systems]
    torch_mliap_model: TorchMliap
    forces: jax.Array
    key: jax.Array
    energies: jax.Array
    temperatures: jax.Array
    neighborlist: Any = None


def start(temperatures: Sequence[float], repeat: int) -> tuple[State, NeighborList]:
    """Diamond cells at rest, with atoms displaced from their sites."""
    cells = [bulk("Si", cubic=True) * (repeat, repeat, repeat) for _ in temperatures]
    for k, atoms in enumerate(cells):
        atoms.rattle(0.02, seed=k)
    positions, cell, pbc, batch = geometry_from_ase(cells)
    module = StillingerWeber()
    model = TorchMliap.from_module(torch.jit.script(module.eval()), module.cutoff)
    particles = Particles(
        jnp.asarray(positions),
        jnp.zeros(positions.shape),
        jnp.asarray(np.concatenate([atoms.get_masses() for atoms in cells]), jnp.float32),
        jnp.full(len(positions), 14, jnp.int32),
        Index.integer(batch, n=len(cells), label=SystemId),
    )
    systems = Systems(
        jnp.asarray(cell), jnp.asarray(pbc), units.kB * jnp.asarray(temperatures, jnp.float32)
    )
    state = State(
        Table.arange(particles, label=ParticleId),
        Table.arange(systems, label=SystemId),
        model,
        jnp.zeros(positions.shape),
        jax.random.key(0),
        jnp.zeros(len(cells)),
        jnp.zeros(len(cells)),
    )
    # Spare capacity: a crystal has 4 neighbours within the cutoff, and 12 more just beyond it.
    listed = neighbor_list(module.cutoff, skin=0.6, capacity_multiplier=3.0)
    return state, listed.allocate(positions, cell, pbc, batch)


def identity(state: State) -> State:
    """The potential's view: the state itself."""
    return state


potential = make_torch_mliap_from_state(identity)


def step(
    state: State, neighbors: NeighborList, dt: float, friction: float
) -> tuple[State, NeighborList]:
    """One BAOAB step: half kick, half drift, friction and noise, half drift, half kick."""
    atoms, systems = state.particles.data, state.systems
    key, noise = jax.random.split(state.key)
    mass = atoms.masses[:, None]
    spread = jnp.sqrt(systems[atoms.system].thermal_energy[:, None] / mass)
    damping = jnp.exp(-friction * dt)

    v = atoms.velocities + 0.5 * dt * state.forces / mass
    x = atoms.positions + 0.5 * dt * v
    v = damping * v + jnp.sqrt(1 - damping**2) * spread * jax.random.normal(noise, v.shape)
    x = x + 0.5 * dt * v
    neighbors = neighbors.update(x, systems.data.cell)
    moved = dataclasses.replace(
        state, particles=state.particles.set_data(dataclasses.replace(atoms, positions=x))
    )
    # The list is up to date: the potential need not compile another search.
    listed = dataclasses.replace(neighbors, schedule="never")
    out = potential(dataclasses.replace(moved, neighborlist=listed)).data
    forces = -out.gradients
    v = v + 0.5 * dt * forces / mass

    twice_kinetic = jnp.zeros(len(systems)).at[atoms.system.indices].add((mass * v**2).sum(1))
    count = jnp.zeros(len(systems)).at[atoms.system.indices].add(3.0)
    atoms = dataclasses.replace(atoms, positions=x, velocities=v)
    return dataclasses.replace(
        state,
        particles=state.particles.set_data(atoms),
        forces=forces,
        key=key,
        energies=out.total_energies.data,
        temperatures=twice_kinetic / (count * units.kB),
    ), neighbors


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the simulation. Returns its results."""
    parser = argparse.ArgumentParser(description="Langevin dynamics of a batch of silicon cells.")
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[300.0, 600.0, 900.0],
        help="K, one per cell",
    )
    parser.add_argument("--repeat", type=int, default=2, help="of the 8-atom cell (default: 2)")
    parser.add_argument(
        "--steps", type=int, default=6000, help="a multiple of 10; the first third is discarded"
    )
    parser.add_argument("--dt", type=float, default=2.0, help="fs (default: 2)")
    parser.add_argument("--friction", type=float, default=0.02, help="1/fs (default: 0.02)")
    options = parser.parse_args(arguments)

    state, neighbors = start(options.temperatures, options.repeat)
    samples: list[tuple[np.ndarray, np.ndarray]] = []

    def ten_steps(state: State, neighbors: NeighborList) -> tuple[State, NeighborList]:
        start = (state, neighbors, 0 * state.energies, 0 * state.temperatures)

        def add(_: int, carry: Any) -> Any:
            state, neighbors, energies, temperatures = carry
            state, neighbors = step(
                state, neighbors, options.dt * units.fs, options.friction / units.fs
            )
            return state, neighbors, energies + state.energies, temperatures + state.temperatures

        state, neighbors, energies, temperatures = jax.lax.fori_loop(0, 10, add, start)
        return dataclasses.replace(
            state, energies=energies / 10, temperatures=temperatures / 10
        ), neighbors

    with tqdm(total=options.steps, unit="step") as bar:

        def progress(_: int, state: State, __: NeighborList) -> None:
            samples.append((np.asarray(state.energies), np.asarray(state.temperatures)))
            bar.update(10)

        run_chunks(ten_steps, state, neighbors, options.steps // 10, chunk=1, progress=progress)
    equilibrated = samples[len(samples) // 3 :]
    energies = np.mean([energy for energy, _ in equilibrated], 0) / (8 * options.repeat**3)
    found = np.mean([temperature for _, temperature in equilibrated], 0)
    pairs = zip(found, options.temperatures, strict=True)
    reached = ", ".join(f"{mean:.0f} K at {wanted:g} K" for mean, wanted in pairs)
    print(f"{len(found)} cells of {8 * options.repeat**3} atoms, {options.steps} steps: {reached}")
    return {
        "temperatures": found,
        "energies": energies,
        "calls": state.torch_mliap_model.wrapper.stats()["calls"],
    }


if __name__ == "__main__":
    main()
