"""Metropolis Monte Carlo of a batch of silicon cells with a TorchScript potential and a cache.

    python examples/monte_carlo.py            # some seconds; needs ase and tqdm

Each step proposes to move one atom of each cell. The move is a patch: the potential evaluates the
state with it, each cell accepts or rejects independently, and the returned patch writes positions
and output of accepted cells. The energies before the move come from the cached output, so a step is
one evaluation.
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
    EMPTY,
    Index,
    NeighborList,
    ParticleId,
    SystemId,
    Table,
    TorchMliap,
    empty_cache,
    geometry_from_ase,
    lens,
    make_torch_mliap_potential,
    neighbor_list,
)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Particles:
    """Atoms, in Å."""

    positions: jax.Array
    atomic_numbers: jax.Array
    system: Index[SystemId]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Systems:
    """Cells, in Å."""

    cell: jax.Array
    pbc: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Atoms, and the potential's output at their positions."""

    particles: Table[ParticleId, Particles]
    systems: Table[SystemId, Systems]
    neighborlist: NeighborList
    output: Any = EMPTY


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Displace:
    """A patch that displaces the atoms of accepted cells by (n, 3) Å."""

    by: jax.Array

    def __call__(self, state: State, accept: Table[SystemId, Any]) -> State:
        """The state with the atoms moved."""
        atoms = state.particles.data
        moved = jnp.where(accept[atoms.system][:, None], atoms.positions + self.by, atoms.positions)
        return POSITIONS.set(state, moved)


POSITIONS = lens(lambda state: state.particles.data.positions)
OUTPUT = lens(lambda state: state.output)


def start(count: int, repeat: int) -> tuple[State, TorchMliap]:
    """A state of perfect crystals, and the model."""
    cells = [bulk("Si", cubic=True) * (repeat, repeat, repeat)] * count
    positions, cell, pbc, batch = geometry_from_ase(cells)
    module = StillingerWeber()
    particles = Particles(
        jnp.asarray(positions),
        jnp.full(len(positions), 14, jnp.int32),
        Index.integer(batch, n=count, label=SystemId),
    )
    # Spare capacity: a crystal has 4 neighbours within the cutoff, and 12 more just beyond it.
    listed = neighbor_list(module.cutoff, capacity_multiplier=4.0)
    state = State(
        Table.arange(particles, label=ParticleId),
        Table.arange(Systems(jnp.asarray(cell), jnp.asarray(pbc)), label=SystemId),
        listed.allocate(positions, cell, pbc, batch),
    )
    return state, TorchMliap.from_module(torch.jit.script(module.eval()), module.cutoff)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Runs the simulation. Returns its results."""
    parser = argparse.ArgumentParser(description="Monte Carlo of a batch of silicon cells.")
    parser.add_argument("--cells", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="of the 8-atom cell (default: 1)")
    parser.add_argument("--temperature", type=float, default=1000.0, help="K (default: 1000)")
    parser.add_argument("--steps", type=int, default=5000, help="(default: %(default)s)")
    parser.add_argument("--length", type=float, default=0.15, help="of a move, Å (default: 0.15)")
    options = parser.parse_args(arguments)

    state, model = start(options.cells, options.repeat)
    potential = make_torch_mliap_potential(
        lambda state: state.particles,
        lambda state: state.systems,
        lambda state: state.neighborlist,
        model,
        lambda _: model.cutoff,
        out_cache_lens=OUTPUT,
    )
    n_atoms = 8 * options.repeat**3
    first = n_atoms * jnp.arange(options.cells)
    thermal_energy = options.temperature * units.kB

    def step(state: State, key: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
        which, where, whether = jax.random.split(key, 3)
        atom = first + jax.random.randint(which, (options.cells,), 0, n_atoms)
        by = jax.random.uniform(where, (options.cells, 3), minval=-1.0) * options.length
        proposal = Displace(jnp.zeros_like(POSITIONS.get(state)).at[atom].set(by))
        result = potential(state, proposal)
        change = result.data.total_energies.data - state.output.total_energies.data
        chance = jnp.exp(jnp.minimum(0.0, -change / thermal_energy))
        # A NaN from an overflowed neighbour list rejects the move; it is checked below.
        accept = jax.random.uniform(whether, (options.cells,)) < chance
        table = result.data.total_energies.set_data(accept)
        return result.patch(state, table), (accept, result.data.total_energies.data)

    state = OUTPUT.set(state, empty_cache(potential, state))
    everywhere = state.systems.set_data(jnp.ones(options.cells, bool))
    store = jax.jit(lambda state: potential(state).patch(state, everywhere))
    state = store(state)
    perfect = float(state.output.total_energies.data[0]) / n_atoms

    run = jax.jit(lambda state, keys: jax.lax.scan(step, state, keys))
    keys = jax.random.split(jax.random.key(0), options.steps)
    accepted, proposed = [], []
    with tqdm(total=options.steps, unit="step") as bar:
        for chunk in np.array_split(np.arange(options.steps), max(1, options.steps // 250)):
            state, (accept, energies) = run(state, keys[chunk])
            if not np.isfinite(energies).all():
                raise RuntimeError("the neighbour list overflowed: give it a larger capacity")
            accepted.append(accept)
            proposed.append(energies)
            bar.update(len(chunk))

    calls = model.wrapper.stats()["calls"]
    # The cache is valid: no evaluation.
    state = jax.block_until_ready(store(state))
    cached = model.wrapper.stats()["calls"] == calls
    rate = float(np.concatenate(accepted).mean())
    energies = np.asarray(state.output.total_energies.data) / n_atoms
    print(
        f"{options.cells} cells of {n_atoms} atoms, {options.steps} steps, {calls} evaluations: "
        f"{100 * rate:.0f} % accepted, {energies.mean() - perfect:.3f} eV/atom above the crystal"
    )
    return {"calls": calls, "cached": cached, "rate": rate, "state": state, "model": model}


if __name__ == "__main__":
    main()
