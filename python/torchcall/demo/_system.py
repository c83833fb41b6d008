"""The demo's atoms: finds the included files, reads structures, draws velocities."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from torchcall._command.included import included_file, load_example
from torchcall._command.parsing import CommandError

__all__ = ["included_file", "load_example"]

DemoError = CommandError


@dataclass(frozen=True)
class Structure:
    """Atoms in ASE's units: Å, eV, atomic mass units, and velocities in Å √(u/eV)⁻¹."""

    name: str
    formula: str
    positions: np.ndarray
    velocities: np.ndarray
    atomic_numbers: np.ndarray
    masses: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray


def require(package: str, purpose: str) -> Any:
    """Imports an optional package.

    Raises:
        DemoError: If it is missing; names the extra to install.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DemoError(
            f"{purpose} needs {package.split('.')[0]}: pip install torchcall[demo] ({error})"
        ) from error


def read_structure(path: Path, *, temperature: float | None, seed: int) -> Structure:
    """Reads the last frame of a file that ASE can read.

    Args:
        path: The file.
        temperature: In K, of drawn velocities. None takes the file's velocities, or 94.4 K if it
            has none.
        seed: Of the drawn velocities.

    Raises:
        DemoError: If the file is missing, cannot be read, or has no usable atoms.
    """
    io, units = (
        require("ase.io", "reading a structure"),
        require("ase.units", "reading a structure"),
    )
    if not path.is_file():
        raise DemoError(f"--structure {path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        atoms = io.read(path, index=-1)
    except Exception as error:
        reason = next(
            (line for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise DemoError(f"--structure {path}: ase cannot read the file: {reason}") from error
    if len(atoms) < 2:
        raise DemoError(f"--structure {path}: expected at least 2 atoms, got {len(atoms)}")
    cell, pbc = np.array(atoms.cell[:], float), np.array(atoms.pbc, bool)
    if not (np.isfinite(atoms.positions).all() and np.isfinite(cell).all()):
        raise DemoError(
            f"--structure {path}: expected finite positions and cell, got NaN or infinity"
        )
    if pbc.any() and not np.linalg.norm(cell, axis=1)[pbc].all():
        raise DemoError(
            f"--structure {path}: expected a lattice vector for each periodic axis, got zero; "
            f"pbc {pbc.tolist()}"
        )
    masses = atoms.get_masses()
    if not (masses > 0).all():
        raise DemoError(f"--structure {path}: expected positive masses, got {masses.min()}")

    if temperature is None and "momenta" in atoms.arrays:
        velocities = atoms.get_velocities()
    else:
        kelvin = 94.4 if temperature is None else temperature
        velocities = thermal_velocities(masses, units.kB * kelvin, seed)
    return Structure(
        name=path.name,
        formula=atoms.get_chemical_formula(empirical=False),
        positions=np.array(atoms.positions),
        velocities=velocities,
        atomic_numbers=atoms.get_atomic_numbers().astype(np.int32),
        masses=masses,
        cell=cell,
        pbc=pbc,
    )


def thermal_velocities(masses: np.ndarray, thermal_energy: float, seed: int) -> np.ndarray:
    """Maxwell-Boltzmann velocities without drift, scaled to the exact temperature."""
    drawn = np.random.default_rng(seed).normal(size=(len(masses), 3)) / np.sqrt(masses)[:, None]
    drawn -= (masses[:, None] * drawn).sum(0) / masses.sum()
    kinetic = 0.5 * (masses[:, None] * drawn**2).sum()
    wanted = 1.5 * (len(masses) - 1) * thermal_energy
    return drawn * np.sqrt(wanted / kinetic)
