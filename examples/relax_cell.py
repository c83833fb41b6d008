"""Relaxes atoms and lattice vectors of a strained silicon cell until its stress vanishes.

    python examples/relax_cell.py             # some seconds; needs ase and tqdm

The potential is Stillinger–Weber in TorchScript (`stillinger_weber.py`) as a function of a state,
with position and cell gradients from one evaluation per step. Each step is steepest descent: atoms
along their forces, the cell by a strain along the stress σ = (1/V) dE/dε,

    r → (r − α ∂E/∂r) (1 − β σ),    h → h (1 − β σ).
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
    lens,
    make_torch_mliap_from_state,
    neighbor_list,
    stress_from_virial_jax,
    virial_from_lattice_gradient_jax,
)

ATOMS = 0.03  # α in Å²/eV, about the inverse of the stiffest spring between atoms
CELL = 0.4  # β in Å³/eV, about the inverse of the stiffest elastic constant


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
    """The state of the potential."""

    particles: Table[ParticleId, Particles]
    systems: Table[SystemId, Systems]
    neighborlist: NeighborList
    torch_mliap_model: TorchMliap


POSITIONS = lens(lambda state: state.particles.data.positions)
CELLS = lens(lambda state: state.systems.data.cell)


def identity(state: State) -> State:
    """The potential's view: the state itself."""
    return state


potential = make_torch_mliap_from_state(identity, compute_position_and_cell_gradients=True)


def start() -> State:
    """Eight displaced atoms in a cell strained by up to 8 %."""
    atoms = bulk("Si", cubic=True)
    generator = np.random.default_rng(0)
    atoms.set_cell(atoms.cell @ (np.eye(3) + generator.uniform(-0.08, 0.08, (3, 3))), True)
    atoms.rattle(0.1, seed=1)
    positions, cell, pbc, batch = geometry_from_ase(atoms, dtype=np.float64)
    module = StillingerWeber(cell_gradients=True)
    model = TorchMliap.from_module(
        torch.jit.script(module.eval()), module.cutoff, compute_cell_gradients=True
    )
    listed = neighbor_list(module.cutoff, capacity_multiplier=2.0)
    return State(
        Table.arange(
            Particles(
                jnp.asarray(positions),
                jnp.asarray(atoms.numbers, jnp.int32),
                Index.integer(batch, n=1, label=SystemId),
            ),
            label=ParticleId,
        ),
        Table.arange(Systems(jnp.asarray(cell), jnp.asarray(pbc)), label=SystemId),
        listed.allocate(positions, cell, pbc, batch),
        model,
    )


def step(state: State, _: None) -> tuple[State, tuple[jax.Array, jax.Array, jax.Array]]:
    """One step of steepest descent; energies, largest force and stress before it."""
    out = potential(state).data
    positions, cell = POSITIONS.get(state), CELLS.get(state)
    by_positions, by_cell = out.gradients
    batch = state.particles.data.system.indices
    pbc = state.systems.data.pbc
    virial = virial_from_lattice_gradient_jax(-by_positions, positions, batch, cell, by_cell, pbc)
    stress = stress_from_virial_jax(virial, cell, convention="ase", pbc=pbc)
    deform = jnp.eye(3) - CELL * stress
    positions = jnp.einsum("ni,nij->nj", positions - ATOMS * by_positions, deform[batch])
    state = CELLS.set(POSITIONS.set(state, positions), cell @ deform)
    return state, (out.total_energies.data, jnp.abs(by_positions).max(), stress)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Relaxes the cell. Returns the results."""
    parser = argparse.ArgumentParser(description="Relax a silicon cell, lattice vectors included.")
    parser.add_argument("--steps", type=int, default=600, help="at most, a multiple of 50")
    parser.add_argument(
        "--tolerance", type=float, default=1e-9, help="eV/Å and eV/Å³ (default: %(default)g)"
    )
    options = parser.parse_args(arguments)
    with jax.enable_x64(True):
        return _relax(options.steps, options.tolerance)


def _relax(steps: int, tolerance: float) -> dict[str, Any]:
    state = start()
    run = jax.jit(lambda state: jax.lax.scan(step, state, length=50))
    stresses, done = [], 0
    energies, force = np.zeros(0), np.zeros(0)
    with tqdm(total=steps, unit="step") as bar:
        while done < steps:
            state, (energies, force, stress) = run(state)
            done += 50
            if not np.isfinite(energies).all():
                raise RuntimeError(f"the neighbour list overflowed before step {done}")
            stresses.append(np.asarray(stress[:, 0]))
            bar.update(50)
            bar.set_postfix(stress=f"{abs(stresses[-1][-1]).max():.1e} eV/Å³")
            if max(float(force[-1]), abs(stresses[-1][-1]).max()) < tolerance:
                break
    first, last, n = stresses[0][0], stresses[-1][-1], len(state.particles)
    lengths = np.linalg.norm(CELLS.get(state)[0], axis=1)
    energy = float(energies[-1, 0]) / n
    print(
        f"after {done} steps: stress {abs(first).max() / units.GPa:.1f} → "
        f"{abs(last).max() / units.GPa:.1e} GPa, {energy:.4f} eV/atom, "
        f"a = {lengths.mean():.4f} Å"
    )
    return {
        "first stress": first,
        "stress": last,
        "energy": energy,
        "force": float(force[-1]),
        "cell": np.asarray(CELLS.get(state)[0]),
        "calls": state.torch_mliap_model.wrapper.stats()["calls"],
        "steps": done,
    }


if __name__ == "__main__":
    main()
