"""Writes `argon.xyz`: 500 atoms of liquid argon near its triple point, with their momenta.

    python examples/make_argon.py            # a few minutes; needs ase

Langevin dynamics with ASE's Lennard-Jones calculator melts an fcc crystal at the liquid's density
(1.374 g/cm³) at 250 K and cools it to 94.4 K. Random numbers are seeded.
"""

import argparse
from pathlib import Path

import numpy as np
from ase import units
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.io import write
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution, Stationary

DENSITY = 1.374  # g/cm³
TEMPERATURE = 94.4  # K


def main() -> None:
    """Melts and cools the crystal and writes the file."""
    parser = argparse.ArgumentParser(description="Write liquid argon.")
    parser.add_argument("--file", type=Path, default=Path(__file__).with_name("argon.xyz"))
    parser.add_argument(
        "--repeat", type=int, default=5, help="conventional cells along each edge (default: 5)"
    )
    options = parser.parse_args()

    mass = bulk("Ar", "fcc", a=1.0).get_masses()[0]
    a = (4.0 * mass / (DENSITY * units.kg / 1e3 / (1e8) ** 3)) ** (1.0 / 3.0)
    atoms = bulk("Ar", "fcc", a=a, cubic=True).repeat(options.repeat)
    generator = np.random.default_rng(0)
    atoms.rattle(0.05, rng=generator)
    atoms.calc = LennardJones(epsilon=0.0104, sigma=3.40, rc=8.5, ro=7.65, smooth=True)
    MaxwellBoltzmannDistribution(atoms, temperature_K=250.0, rng=generator)
    for temperature, steps in ((250.0, 800), (TEMPERATURE, 2400)):
        dynamics = Langevin(
            atoms,
            5.0 * units.fs,
            temperature_K=temperature,
            friction=0.01 / units.fs,
            rng=generator,
        )
        dynamics.run(steps)
        print(f"{steps} steps at {temperature} K: {atoms.get_temperature():.1f} K", flush=True)
    Stationary(atoms)
    atoms.calc = None
    atoms.positions = atoms.positions.round(5)
    atoms.set_momenta(atoms.get_momenta().round(5))
    write(options.file, atoms, format="extxyz")


if __name__ == "__main__":
    main()
