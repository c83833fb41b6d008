"""The simulated atoms, and their initial velocities."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from torchcall.mliap import geometry_from_ase

if TYPE_CHECKING:
    import ase


@dataclass(frozen=True)
class System:
    """N atoms in ASE's units: Å, eV, atomic mass units, and velocities in Å √(eV/u).

    Attributes:
        positions: (N, 3).
        velocities: (N, 3); None where the structure has none.
        numbers: (N,) int32, atomic numbers.
        masses: (N,).
        cell: (3, 3), rows are lattice vectors.
        pbc: (3,) bool.
        charge: In e.
        spin: Multiplicity.
        symbols: The chemical symbols.
        formula: For people.
    """

    positions: np.ndarray
    velocities: np.ndarray | None
    numbers: np.ndarray
    masses: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    charge: float
    spin: float
    symbols: list[str]
    formula: str

    @classmethod
    def from_ase(cls, atoms: "ase.Atoms") -> "System":
        """The system of a structure that was read."""
        geometry = geometry_from_ase(atoms, dtype=np.float64)
        moving = "momenta" in atoms.arrays and np.any(atoms.get_momenta())
        return cls(
            positions=geometry.positions,
            velocities=atoms.get_velocities() if moving else None,
            numbers=atoms.get_atomic_numbers().astype(np.int32),
            masses=np.asarray(atoms.get_masses()),
            cell=geometry.cell[0],
            pbc=geometry.pbc[0],
            charge=float(geometry.charge[0]),
            spin=float(geometry.spin[0]),
            symbols=list(atoms.get_chemical_symbols()),
            formula=atoms.get_chemical_formula(empirical=False),
        )


def initial_momenta(
    system: System, replicas: int, *, thermal_energy: float | None, seed: int
) -> np.ndarray:
    """Momenta (R, N, 3) in u Å √(eV/u).

    Args:
        system: The atoms.
        replicas: R.
        thermal_energy: k T in eV of drawn velocities, different in each replica. None: the
            structure's own velocities, the same in each.
        seed: Of the drawn velocities.
    """
    if thermal_energy is None:
        assert system.velocities is not None
        drawn = np.broadcast_to(system.velocities, (replicas, *system.velocities.shape))
    else:
        generators = np.random.default_rng(seed).spawn(replicas)
        drawn = np.stack([_thermal(system.masses, thermal_energy, own) for own in generators])
    return system.masses[:, None] * drawn


def _thermal(masses: np.ndarray, thermal_energy: float, generator: Any) -> np.ndarray:
    """Maxwell-Boltzmann velocities without drift, scaled to the exact temperature."""
    drawn = generator.normal(size=(len(masses), 3)) / np.sqrt(masses)[:, None]
    if len(masses) == 1:
        return drawn * np.sqrt(thermal_energy)
    drawn -= (masses[:, None] * drawn).sum(0) / masses.sum()
    kinetic = 0.5 * (masses[:, None] * drawn**2).sum()
    wanted = 1.5 * (len(masses) - 1) * thermal_energy
    return drawn * np.sqrt(wanted / kinetic)
