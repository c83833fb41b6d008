"""Lennard-Jones with the smooth cutoff of jax-md and ASE, in double precision."""

import re
from pathlib import Path

import numpy as np
import torch

from torchcall.mliap import TorchMliap

# In eV and Å. jax-md rounds them to float32, which changes none of them.
EPSILON, SIGMA, ONSET, CUTOFF = 0.01171875, 3.5, 4.0, 5.0


class LennardJones(torch.nn.Module):
    """`½ Σ 4 ε (s² − s) S`, `s = (σ/r)⁶`, `S` as jax-md's `multiplicative_isotropic_cutoff`."""

    def __init__(self, cutoff: float = CUTOFF) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.onset = cutoff - (CUTOFF - ONSET)
        self.register_buffer("epsilon", torch.tensor(EPSILON, dtype=torch.float64))
        self.sigma = SIGMA

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        i, j = input["edge_index"][0], input["edge_index"][1]
        cells = input["cell"][input["batch"][i]]
        shift = (input["cell_offsets"].unsqueeze(1) @ cells).squeeze(1)
        u = (input["pos"][j] - input["pos"][i] + shift).square().sum(1)
        on, off = self.onset * self.onset, self.cutoff * self.cutoff
        smooth = (off - u).square() * (off + 2 * u - 3 * on) / (off - on) ** 3
        switch = torch.where(u < on, 1.0, torch.where(u < off, smooth, 0.0))
        s = (self.sigma * self.sigma / u) ** 3
        pairs = 2 * self.epsilon * (s * s - s) * switch
        total = torch.zeros(input["cell"].size(0), dtype=pairs.dtype)
        return total.index_add(0, input["batch"][i], pairs)


def potential(cutoff=CUTOFF):
    return TorchMliap.from_energy(LennardJones(cutoff).eval(), engine="script")


class Gradients(torch.nn.Module):
    """Energies and position gradients only."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = LennardJones()

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos = input["pos"].detach().requires_grad_(True)
        energy = self.potential({**input, "pos": pos})
        (gradient,) = torch.autograd.grad([energy.sum()], [pos])
        return {"energy": energy.detach(), "position_gradients": gradient}


def without_cell_gradients():
    return TorchMliap.from_module(Gradients().eval(), CUTOFF)


def fractional_argon(cells=2, noise=0.01):
    """(4 cells³, 3) fractional positions of a slightly disordered fcc crystal."""
    basis = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]])
    corners = np.stack(np.meshgrid(*[np.arange(cells)] * 3, indexing="ij"), -1).reshape(-1, 1, 3)
    ideal = (corners + basis).reshape(-1, 3) / cells
    return (ideal + np.random.default_rng(3).normal(0, noise, ideal.shape)) % 1.0


def documented(name):
    """The example of the documentation that uses a name."""
    page = Path(__file__).parents[2] / "docs" / "integrations.md"
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if name in block]
    return found
