"""Comparison of a loaded potential with a network's own ASE calculator."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import ase
import ase.md.verlet
import ase.units
import jax
import jax.numpy as jnp
import numpy as np

from torchcall.mliap import (
    AtomGraph,
    TorchMliap,
    energy,
    energy_and_gradients,
    geometry_from_ase,
    neighbor_list,
    stress_from_virial_jax,
    virial_from_lattice_gradient_jax,
)


class Tolerance(NamedTuple):
    """Largest differences: eV per atom, eV/Å and eV/Å³; relative ones where they are larger."""

    energy: float
    forces: float
    stress: float
    relative: float = 0.0


FLOAT32 = Tolerance(energy=1e-6, forces=5e-5, stress=1e-6)
FLOAT64 = Tolerance(energy=1e-9, forces=1e-9, stress=1e-9, relative=1e-9)


class Results(NamedTuple):
    """Energies (B,), forces (N, 3) and stresses (B, 3, 3) in ASE's sign."""

    energy: np.ndarray
    forces: np.ndarray
    stress: np.ndarray


def dtype_of(tolerance: Tolerance) -> Any:
    """The positions' dtype for which a tolerance is meant."""
    return np.float64 if tolerance.relative else np.float32


def cutoff_of(model: TorchMliap) -> float:
    return float(np.max(np.asarray(model.cutoff.data)))


def graph_of(
    model: TorchMliap, systems: list[ase.Atoms], dtype: Any, beyond: float = 0.0
) -> AtomGraph:
    """The graph of some systems within the model's cutoff plus `beyond`, in Å."""
    geometry = geometry_from_ase(systems, dtype=dtype)
    neighbors = neighbor_list(cutoff_of(model) + beyond).allocate(*geometry)
    numbers = np.concatenate([system.numbers for system in systems])
    return AtomGraph.from_neighbors(
        neighbors,
        geometry.positions,
        geometry.cell,
        numbers,
        charge=geometry.charge,
        spin=geometry.spin,
    )


def evaluate(model: TorchMliap, systems: list[ase.Atoms], dtype: Any) -> Results:
    """Energies, forces and stresses by torchcall, in a jitted program."""
    graph = graph_of(model, systems, dtype)
    out = jax.jit(energy_and_gradients)(model, graph)
    forces = -out.position_gradients
    virial = virial_from_lattice_gradient_jax(
        forces, graph.positions, graph.batch, graph.cell, out.cell_gradients, pbc=graph.pbc
    )
    stress = stress_from_virial_jax(virial, graph.cell, convention="ase", pbc=graph.pbc)
    return Results(np.asarray(out.energy), np.asarray(forces), np.asarray(stress))


def reference(calculator: Any, system: ase.Atoms, *, stress: bool = True) -> Results:
    """The same by the network's own calculator."""
    atoms = system.copy()
    atoms.calc = calculator
    full = atoms.get_stress(voigt=False) if stress else np.full((3, 3), np.nan)
    return Results(
        np.array([atoms.get_potential_energy()]), np.asarray(atoms.get_forces()), full[None]
    )


def assert_equal(found: Results, expected: Results, tolerance: Tolerance, *, n_atoms: Any) -> None:
    """Compares results; stresses only where the expected one is known.

    Args:
        found, expected: the results.
        tolerance: see `Tolerance`.
        n_atoms: number of atoms of each system.
    """
    assert np.isfinite(found.energy).all()
    assert np.isfinite(found.forces).all()
    limit = tolerance.energy * np.asarray(n_atoms) + tolerance.relative * abs(expected.energy)
    error = abs(found.energy - expected.energy)
    assert (error <= limit).all(), f"energy: error {error} eV, limit {limit}"
    for name in ("forces", "stress"):
        got, wanted = getattr(found, name), getattr(expected, name)
        known = np.isfinite(wanted)
        if not known.any():
            continue
        limit = getattr(tolerance, name) + tolerance.relative * abs(wanted[known]).max()
        worst = abs(got[known] - wanted[known]).max()
        assert worst <= limit, f"{name}: error {worst}, limit {limit}"


def check_structures(
    model: TorchMliap,
    calculator: Any,
    systems: dict[str, ase.Atoms],
    tolerance: Tolerance,
    *,
    stress: tuple[str, ...] = ("bulk", "triclinic"),
) -> None:
    """Compares each system alone, then all of them as one batch.

    Args:
        model: the potential.
        calculator: the network's own.
        systems: by name, see `structures.structures`.
        tolerance: see `Tolerance`.
        stress: names of the systems whose stress the calculator defines as we do.
    """
    dtype = dtype_of(tolerance)
    expected = {
        name: reference(calculator, atoms, stress=name in stress) for name, atoms in systems.items()
    }
    for name, atoms in systems.items():
        found = evaluate(model, [atoms], dtype)
        assert_equal(found, expected[name], tolerance, n_atoms=[len(atoms)])
    found = evaluate(model, list(systems.values()), dtype)
    together = Results(*map(np.concatenate, zip(*expected.values(), strict=True)))
    assert_equal(found, together, tolerance, n_atoms=[len(a) for a in systems.values()])


def check_dynamics(
    model: TorchMliap, calculator: Any, atoms: ase.Atoms, dtype: Any, *, steps: int = 100
) -> None:
    """NVE from 300 K in steps of 1 fs; positions as with ASE's `VelocityVerlet` to 1e-5 Å."""
    start = atoms.copy()
    rng = np.random.default_rng(0)
    masses = start.get_masses()[:, None]
    start.set_momenta(rng.normal(size=(len(start), 3)) * np.sqrt(masses * 300 * ase.units.kB))
    theirs = start.copy()
    theirs.calc = calculator
    ase.md.verlet.VelocityVerlet(theirs, timestep=1.0 * ase.units.fs).run(steps)
    ours = _trajectory(model, start, dtype, steps)
    assert abs(ours - theirs.positions).max() < 1e-5


def _trajectory(model: TorchMliap, atoms: ase.Atoms, dtype: Any, steps: int) -> np.ndarray:
    geometry = geometry_from_ase(atoms, dtype=dtype)
    neighbors = neighbor_list(cutoff_of(model), capacity_multiplier=1.5).allocate(*geometry)
    cell, numbers = jnp.asarray(geometry.cell), jnp.asarray(atoms.numbers)
    masses = jnp.asarray(atoms.get_masses()[:, None], dtype)
    dt = 1.0 * ase.units.fs

    @jax.jit
    def run(model, positions, velocities, neighbors):
        def forces(positions, neighbors):
            neighbors = neighbors.update(positions, cell)
            graph = AtomGraph.from_neighbors(neighbors, positions, cell, numbers)
            return -energy_and_gradients(model, graph).position_gradients, neighbors

        def step(carry, _):
            positions, velocities, force, neighbors = carry
            velocities = velocities + 0.5 * dt * force / masses
            positions = positions + dt * velocities
            force, neighbors = forces(positions, neighbors)
            return (positions, velocities + 0.5 * dt * force / masses, force, neighbors), None

        force, neighbors = forces(positions, neighbors)
        carry = (positions, velocities, force, neighbors)
        (positions, _, _, neighbors), _ = jax.lax.scan(step, carry, None, length=steps)
        return positions, neighbors.did_overflow

    positions = jnp.asarray(geometry.positions)
    velocities = jnp.asarray(atoms.get_velocities(), dtype)
    positions, overflowed = run(model, positions, velocities, neighbors)
    assert not bool(overflowed)
    return np.asarray(positions)


def check_second_derivatives(
    model: TorchMliap, atoms: ase.Atoms, forces: Callable[[np.ndarray], np.ndarray]
) -> None:
    """A Hessian-vector product in float64 against differences of `forces(positions)` in eV/Å."""
    graph = graph_of(model, [atoms], np.float64)
    direction = np.random.default_rng(0).normal(size=graph.positions.shape)

    def total(positions):
        return energy(model, dataclasses.replace(graph, positions=positions)).sum()

    def push(positions, direction):
        return jax.jvp(jax.grad(total), (positions,), (direction,))[1]

    found = np.asarray(jax.jit(push)(graph.positions, jnp.asarray(direction)))

    def difference(step):
        ends = [forces(atoms.positions + sign * step * direction) for sign in (1, -1)]
        return (ends[1] - ends[0]) / (2 * step)

    step = 1e-4  # Richardson: the error is of fourth order
    expected = (4 * difference(step / 2) - difference(step)) / 3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * abs(expected).max())


def forces_of(calculator: Any, atoms: ase.Atoms) -> Callable[[np.ndarray], np.ndarray]:
    """Forces by the network's own calculator, a function of the positions."""

    def forces(positions: np.ndarray) -> np.ndarray:
        moved = atoms.copy()
        moved.positions = positions
        moved.calc = calculator
        return np.asarray(moved.get_forces())

    return forces
