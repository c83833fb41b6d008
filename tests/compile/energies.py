"""Modules that return energies only, or unusual results."""

import reference
import torch


def vectors(input):
    """The vector r of each edge."""
    pos, (sender, receiver) = input["pos"], input["edge_index"]
    cell = input["cell"].index_select(0, input["batch"].index_select(0, sender))
    shifts = (input["cell_offsets"].unsqueeze(2) * cell).sum(1)
    return pos.index_select(0, receiver) - pos.index_select(0, sender) + shifts


def by_system(per_edge, input):
    """Sums over the edges of each system."""
    system = input["batch"].index_select(0, input["edge_index"][0])
    zeros = torch.zeros(input["cell"].size(0), dtype=per_edge.dtype, device=per_edge.device)
    return zeros.index_add(0, system, per_edge)


class Pairs(torch.nn.Module):
    """The energies of the Lennard-Jones example, without its gradients."""

    def __init__(self):
        super().__init__()
        self.pairs = reference.example("lennard_jones").LennardJones(**reference.LJ)

    def forward(self, input):
        return by_system(self.pairs.pair(vectors(input).square().sum(1))[0], input)


class Energies(torch.nn.Module):
    """The energy method of an example, as a module."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input):
        keys = ("pos", "cell", "atomic_numbers", "edge_index", "cell_offsets", "batch")
        names = self.model.energy.__code__.co_varnames
        arguments = {key: input[key] for key in keys if key in names}
        return {"energy": self.model.energy(**arguments)}


class Soft(torch.nn.Module):
    """A weight times the sum of exp(−r²)."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7, dtype=dtype))

    def forward(self, input):
        return self.weight * by_system(torch.exp(-vectors(input).square().sum(1)), input)


def odd(function, name="Odd"):
    """A module whose forward is `function(input, energies of Soft)`."""

    def forward(self, input):
        return function(input, Soft.forward(self, input))

    return type(name, (Soft,), {"forward": forward})()
