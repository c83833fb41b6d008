"""Liquid argon: the included structure and potential."""

from dataclasses import dataclass
from typing import Any

import ase.io
import numpy as np
import torch
from ase import units

from torchcall._command.included import included_file, load_example, quiet_torchscript


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


def read_argon(*, temperature: float, seed: int) -> Structure:
    """The included 500 atoms, with velocities of this temperature in K."""
    atoms: Any = ase.io.read(included_file("argon.xyz"), index=-1)
    masses = atoms.get_masses()
    return Structure(
        name="argon.xyz",
        formula=atoms.get_chemical_formula(),
        positions=np.array(atoms.positions),
        velocities=thermal_velocities(masses, units.kB * temperature, seed),
        atomic_numbers=atoms.get_atomic_numbers().astype(np.int32),
        masses=masses,
        cell=np.array(atoms.cell[:]),
        pbc=np.array(atoms.pbc),
    )


def argon_module(cutoff: float) -> torch.jit.ScriptModule:
    """Lennard-Jones argon in TorchScript, without cell gradients."""
    with quiet_torchscript():
        return torch.jit.script(load_example("lennard_jones").LennardJones(cutoff=cutoff).eval())


def thermal_velocities(masses: np.ndarray, thermal_energy: float, seed: int) -> np.ndarray:
    """Maxwell-Boltzmann velocities without drift, scaled to the exact temperature."""
    drawn = np.random.default_rng(seed).normal(size=(len(masses), 3)) / np.sqrt(masses)[:, None]
    drawn -= (masses[:, None] * drawn).sum(0) / masses.sum()
    kinetic = 0.5 * (masses[:, None] * drawn**2).sum()
    wanted = 1.5 * (len(masses) - 1) * thermal_energy
    return drawn * np.sqrt(wanted / kinetic)
