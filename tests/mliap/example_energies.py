"""The examples' potentials as modules that return energies alone."""

import reference
import torch
from reference import CUTOFF

from torchcall.mliap import TorchMliap


class Silicon(torch.nn.Module):
    """Stillinger-Weber, or a network with the same inputs and the elements."""

    def __init__(self, potential: torch.nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, graph: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.potential.energy(
            graph["pos"], graph["cell"], graph["edge_index"], graph["cell_offsets"], graph["batch"]
        )


class Network(torch.nn.Module):
    """Message passing."""

    def __init__(self, potential: torch.nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def forward(self, graph: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.potential.energy(
            graph["pos"],
            graph["cell"],
            graph["atomic_numbers"],
            graph["edge_index"],
            graph["cell_offsets"],
            graph["batch"],
        )


def potential(name, engine):
    """The potential, and the module of the examples for its twin in JAX."""
    module = reference.potentials()[name]
    kind = {"Stillinger-Weber": Silicon, "message passing": Network}[name]
    return TorchMliap.from_energy(kind(module), CUTOFF, engine=engine), module
