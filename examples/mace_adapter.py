"""A random MACE of silicon, as a package.

    python examples/mace_adapter.py mace.pt2                     # a random model, as a package
    python -m torchcall compile examples/mace_adapter.py:random_silicon mace.pt2 \\
        --example silicon.cif --cutoff 5

Needs mace-torch (`pip install mace-torch`; requirements/mace.txt pins what is tested).

`torchcall.models.load("NAME.model")` loads a trained one; `engine="package"` compiles it. This
example builds the network itself, with `mace.tools.compile.prepare`: e3nn otherwise generates
TorchScript, which makes the numbers of atoms and edges constants in a package.

I. Batatia et al., NeurIPS 2022, https://arxiv.org/abs/2206.07697.
"""

# pyright: reportMissingImports=false
# mace-torch is optional.

import argparse
from typing import Any

import torch

from torchcall.models.mace import MaceEnergy


def random_mace(*, for_compile: bool, hidden: str = "32x0e + 32x1o", seed: int = 0) -> Any:
    """A ScaleShiftMACE of silicon with random weights: 2 layers, cutoff 5 Å.

    Args:
        for_compile: whether to build it without e3nn's scripted code.
        hidden: the irreps of the features.
        seed: of the weights, which do not depend on `for_compile`.
    """
    import mace  # noqa: F401  first: it lets e3nn load its constants
    import numpy as np
    from e3nn import o3
    from mace.modules import ScaleShiftMACE, interaction_classes
    from mace.tools.compile import prepare

    interaction = interaction_classes["RealAgnosticResidualInteractionBlock"]
    make = prepare(ScaleShiftMACE, allow_autograd=False) if for_compile else ScaleShiftMACE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(
            r_max=5.0,
            num_bessel=8,
            num_polynomial_cutoff=5,
            max_ell=3,
            interaction_cls=interaction,
            interaction_cls_first=interaction,
            num_interactions=2,
            num_elements=1,
            hidden_irreps=o3.Irreps(hidden),
            MLP_irreps=o3.Irreps("16x0e"),
            atomic_energies=np.array([-3.0]),
            avg_num_neighbors=28.0,
            atomic_numbers=[14],
            correlation=3,
            gate=torch.nn.functional.silu,
            atomic_inter_scale=1.0,
            atomic_inter_shift=0.0,
        )
    # Otherwise autograd would record weight gradients in every call.
    return model.eval().requires_grad_(False)


def random_silicon() -> MaceEnergy:
    """The module for `python -m torchcall compile examples/mace_adapter.py:random_silicon`."""
    return MaceEnergy(random_mace(for_compile=True))


def silicon(repeat: int = 2) -> Any:
    """8 `repeat`³ silicon atoms near a diamond lattice, as a `torchcall.mliap.AtomGraph`."""
    import ase.build
    import jax.numpy as jnp
    import numpy as np

    from torchcall.mliap import AtomGraph, neighbor_list

    atoms = ase.build.bulk("Si", cubic=True) * (repeat, repeat, repeat)
    atoms.rattle(0.05, seed=0)
    positions = jnp.asarray(atoms.positions, jnp.float32)
    cell = jnp.asarray(np.asarray(atoms.cell), jnp.float32)[None]
    pbc = jnp.asarray(atoms.pbc)[None]
    batch = jnp.zeros(len(atoms), jnp.int32)
    search = neighbor_list(5.0, capacity_multiplier=1.0)
    neighbors = search.allocate(positions, cell, pbc, batch)
    return AtomGraph.from_neighbors(neighbors, positions, cell, jnp.asarray(atoms.numbers))


def main() -> None:
    """Compiles the random model into a package."""
    import torchcall.mliap

    parser = argparse.ArgumentParser(description="Compile a random MACE model into a package.")
    parser.add_argument("file", help="where to write, e.g. mace.pt2")
    options = parser.parse_args()
    torchcall.mliap.compile(random_silicon(), options.file, example=silicon(), cutoff=5.0)


if __name__ == "__main__":
    main()
