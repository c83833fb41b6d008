"""Several modules as one, in torch."""

from collections.abc import Sequence
from typing import Any, Final

import torch

from torchcall.mliap._from_energy import SCRIPTING


class _Member(torch.nn.Module):
    """A module, which gets copies: it may write to its input."""

    casts: Final[bool]
    like: torch.Tensor

    def __init__(self, module: Any, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.module = module
        self.casts = dtype is not None
        self.register_buffer("like", torch.zeros(0, dtype=dtype or torch.int64), persistent=False)

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        given: dict[str, torch.Tensor] = {}
        for key, value in input.items():
            if self.casts and value.is_floating_point():
                value = value.to(self.like.dtype)
            given[key] = value.clone()
        return self.module(given)


class Committee(torch.nn.Module):
    """Means and deviations of what the members return, with the interface `TorchMliapForward`.

    Args:
        members: each with the dtype to which its float inputs are cast, or None.
        cell_gradients: whether they return `cell_gradients`.
        species: the elements that all know; empty where they are unknown.
    """

    cell_gradients: Final[bool]

    def __init__(
        self,
        members: Sequence[tuple[Any, torch.dtype | None]],
        cell_gradients: bool,
        species: list[int],
    ) -> None:
        super().__init__()
        self.members = torch.nn.ModuleList([_Member(*member) for member in members])
        self.cell_gradients = cell_gradients
        self.committee_size = len(members)
        if species:
            self.species = species

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        dtype = input["pos"].dtype
        energies: list[torch.Tensor] = []
        gradients: list[torch.Tensor] = []
        cells: list[torch.Tensor] = []
        for member in self.members:
            out = member(input)
            energies.append(out["energy"].to(dtype))
            gradients.append(out["position_gradients"].to(dtype))
            if self.cell_gradients:
                cells.append(out["cell_gradients"].to(dtype))
        energy, slopes = torch.stack(energies), torch.stack(gradients)
        mean, slope = energy.mean(0), slopes.mean(0)
        result: dict[str, torch.Tensor] = {
            "energy": mean,
            "energy_deviation": (energy - mean).square().mean(0).sqrt(),
            "position_gradients": slope,
            "position_gradients_deviation": (slopes - slope).square().sum(2).mean(0).sqrt(),
        }
        if self.cell_gradients:
            result["cell_gradients"] = torch.stack(cells).mean(0)
        return result


def combined(
    members: Sequence[tuple[Any, torch.dtype | None]],
    engines: Sequence[str],
    cell_gradients: bool,
    species: list[int],
) -> tuple[torch.nn.Module, str]:
    """The committee's module, and why it is not TorchScript; empty where it is.

    Args:
        members, cell_gradients, species: see `Committee`.
        engines: of the members.
    """
    module = Committee(members, cell_gradients, species)
    if "TorchScript" not in engines:
        return module, ""
    for k, engine in enumerate(engines):
        if engine != "TorchScript":
            return module, f"models[{k}] is eager"
    try:
        with SCRIPTING:
            return torch.jit.script(module), ""
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return module, f"TorchScript does not compile the committee: {first.strip()}"
