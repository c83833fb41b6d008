"""Structures on which networks are compared with their own ASE calculators."""

import ase
import ase.build
import numpy as np


def structures(first: str, second: str, lattice: float, *, seed: int = 0) -> dict[str, ase.Atoms]:
    """Distorted structures of two elements, by name.

    Args:
        first, second: chemical symbols of a rocksalt crystal.
        lattice: lattice constant in Å.
        seed: seed of the distortions.

    Returns:
        "bulk"; "triclinic": strained, atoms displaced by lattice vectors; "slab": open along z,
        with vacuum; "molecule": four atoms without a cell.
    """
    rng = np.random.default_rng(seed)
    bulk = ase.build.bulk(f"{first}{second}", "rocksalt", a=lattice, cubic=True)
    bulk.positions += rng.normal(scale=0.08, size=bulk.positions.shape)
    bulk.positions += 0.1  # no atom at the origin, where phantom atoms are

    triclinic = bulk.copy()
    strain = np.eye(3) + rng.uniform(-0.06, 0.06, (3, 3))
    triclinic.set_cell(np.asarray(triclinic.cell) @ strain, scale_atoms=True)
    images = rng.integers(-3, 4, (len(triclinic), 3))
    triclinic.positions += images @ np.asarray(triclinic.cell)

    slab = bulk.copy()
    slab.cell[2] = [0.0, 0.0, lattice + 14.0]
    slab.pbc = (True, True, False)

    molecule = bulk[:4]
    molecule.pbc = False
    molecule.cell = None
    return {"bulk": bulk, "triclinic": triclinic, "slab": slab, "molecule": molecule}
