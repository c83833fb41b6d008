"""Phonon frequencies of silicon at Γ, from the Hessian of a PyTorch potential.

The force constants are the Hessian of the energy, `K = ∂²E/∂r∂r` in eV/Å², which `jax.hessian`
takes exactly, in one custom call. The frequencies are those of the mass-weighted matrix:

    D_ia,jb = K_ia,jb / √(m_i m_j),    D e = ω² e,    f = ω / 2π.

For a cell of n × n × n cubes the modes at Γ are those of the crystal at all wave vectors that the
cell's periodicity allows. For comparison, the program also computes K by central differences of the
forces of N atoms, which take 6 N evaluations and have an error, and prints both times.

    python examples/phonons.py --repeat 2
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ase import units
from ase.build import bulk
from jax import Array
from stillinger_weber import StillingerWeber

from torchcall import mliap

STEP = 1e-3  # Å, of the central differences


class Silicon(torch.nn.Module):
    """The energy of Stillinger-Weber silicon, which torchcall differentiates."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = StillingerWeber()
        self.cutoff = self.potential.cutoff

    def forward(self, graph: dict[str, torch.Tensor]) -> torch.Tensor:
        """Energy of each system, `(B,)` in eV."""
        return self.potential.energy(
            graph["pos"], graph["cell"], graph["edge_index"], graph["cell_offsets"], graph["batch"]
        )


def energy_function(model: mliap.TorchMliap, graph: mliap.AtomGraph) -> Callable[[Array], Array]:
    """E in eV, a function of the positions `(n, 3)` in Å, with the graph's pairs."""

    def energy(positions: Array) -> Array:
        return mliap.energy(model, replace(graph, positions=positions)).sum()

    return energy


def differences(gradient: Callable[[Array], Array], positions: Array) -> Array:
    """∂g/∂r by central differences: 6 N evaluations of the gradient g, one after the other."""
    moves = STEP * jnp.eye(positions.size, dtype=positions.dtype)

    def row(move: Array) -> Array:
        move = move.reshape(positions.shape)
        return (gradient(positions + move) - gradient(positions - move)) / (2 * STEP)

    return jax.lax.map(row, moves)


def frequencies(constants: np.ndarray, masses: np.ndarray) -> np.ndarray:
    """f in THz, ascending, `(3 N,)`; negative where ω² is.

    Args:
        constants: K, `(3 N, 3 N)` in eV/Å².
        masses: m, `(N,)` in atomic mass units.
    """
    roots = np.sqrt(np.repeat(masses, 3))
    squares = np.linalg.eigvalsh((constants + constants.T) / 2 / np.outer(roots, roots))
    # ASE's unit of time is Å √(u/eV).
    return np.sign(squares) * np.sqrt(np.abs(squares)) * units.second / 1e12 / (2 * np.pi)


def timed(function: Callable[[Array], Array], positions: Array) -> tuple[np.ndarray, float]:
    """The result of the second call, and its seconds: the first one compiles."""
    run = jax.jit(function)
    run(positions).block_until_ready()
    start = time.perf_counter()
    result = run(positions).block_until_ready()
    return np.asarray(result).reshape(positions.size, positions.size), time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Prints the acoustic and the highest frequencies, and the two times."""
    parser = argparse.ArgumentParser(description="Phonons of silicon at Γ, by jax.hessian.")
    parser.add_argument("--repeat", type=int, default=2, help="cubic cells per axis (default: 2)")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    torch.set_num_threads(1)  # threads slow small operations

    model = mliap.TorchMliap.from_energy(Silicon())
    crystal = bulk("Si", a=5.431, cubic=True).repeat(options.repeat)
    positions, cell = jnp.asarray(crystal.positions), jnp.asarray(crystal.cell.array)[None]
    periodic, batch = np.ones((1, 3), bool), np.zeros(len(crystal), int)
    cutoff = float(model.cutoff.data[0])
    neighbors = mliap.neighbor_list(cutoff, skin=8 * STEP).allocate(
        positions, cell, periodic, batch
    )
    graph = mliap.AtomGraph.from_neighbors(neighbors, positions, cell, crystal.numbers)
    energy = energy_function(model, graph)

    exact, seconds = timed(jax.hessian(energy), positions)
    approximate, slow = timed(lambda x: differences(jax.grad(energy), x), positions)
    found = frequencies(exact, crystal.get_masses())
    print(f"{len(crystal)} atoms, modes at Γ in THz")
    print(f"  acoustic  {', '.join(f'{f:.4f}' for f in found[:3])}")
    print(f"  highest   {', '.join(f'{f:.4f}' for f in found[-3:])}")
    print(f"jax.hessian                     {1e3 * seconds:8.1f} ms")
    print(
        f"{6 * len(crystal)} finite-difference forces".ljust(32)
        + f"{1e3 * slow:8.1f} ms, largest difference {np.abs(approximate - exact).max():.1e} eV/Å²"
    )
    return {"frequencies": found, "exact": exact, "differences": approximate}


if __name__ == "__main__":
    main()
