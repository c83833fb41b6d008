"""Small models for calls on devices."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchcall import TorchModuleWrapper


class Forces(nn.Module):
    """A pair potential of two layers: energy and gradient, by autograd inside `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, pos: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        pos = pos.requires_grad_(True)
        bonds = pos.index_select(0, edge_index[1]) - pos.index_select(0, edge_index[0])
        energies = self.last(torch.nn.functional.silu(self.layer(bonds)))
        per_atom = torch.zeros_like(pos[:, 0]).index_add(0, edge_index[0], energies.squeeze(-1))
        total = per_atom.pow(2).sum()
        gradient = torch.autograd.grad([total], [pos])[0]
        assert gradient is not None
        return total.detach(), gradient


def force_input(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Positions, and edges in int32, as in JAX without x64."""
    positions = np.random.default_rng(seed).normal(size=(5, 3)).astype(np.float32)
    return positions, np.array([[0, 1, 2, 3], [1, 2, 3, 4]], np.int32)


def script(module: nn.Module, **options: Any) -> TorchModuleWrapper:
    return _wrapped(torch.jit.script(module), **options)


def eager_forces(module: nn.Module, **options: Any) -> TorchModuleWrapper:
    return _wrapped(module, **options)


def _wrapped(module: Any, **options: Any) -> TorchModuleWrapper:
    spec = ((None, torch.int64), {})
    return TorchModuleWrapper(module, requires_grad=True, input_spec=spec, **options)
