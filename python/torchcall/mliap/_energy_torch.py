"""Edge vectors, and the gradients of a module that returns energies only; in torch."""

from typing import Any, Final

import torch

from torchcall._engines.names import name_of
from torchcall.mliap._species import species_of


def edge_vectors(input: dict[str, torch.Tensor]) -> torch.Tensor:
    """`r = pos[j] − pos[i] + S h` of each edge, `(E, 3)` in Å.

    i is the sender, `edge_index[0]`; j the receiver, `edge_index[1]`; S the row of `cell_offsets`;
    h the cell of the sender's system, `cell[batch[i]]`. r points from i to the image of j.
    Differentiable in `pos` and `cell`; can be scripted, exported and captured into a CUDA graph.

    Args:
        input: an `AtomGraphInput`: `pos (N, 3)` and `cell (B, 3, 3)` in Å, rows are lattice
            vectors; `edge_index (2, E)` and `batch (N,)`, int64; `cell_offsets (E, 3)`, whole
            numbers, in any dtype.

    Returns:
        `(E, 3)` in Å, in the positions' dtype. No row is zero unless two atoms coincide.
    """
    pos = input["pos"]
    sender, receiver = input["edge_index"][0], input["edge_index"][1]
    cell = input["cell"].index_select(0, input["batch"].index_select(0, sender))
    shift = (input["cell_offsets"].to(pos.dtype).unsqueeze(2) * cell).sum(1)
    return pos.index_select(0, receiver) - pos.index_select(0, sender) + shift


class EnergyGradients(torch.nn.Module):
    """Energies of a module and their derivatives by positions and lattice vectors.

    Derivatives are those of the sum over all systems, by autograd:

        position_gradients = ∂E/∂r,    cell_gradients = ∂E/∂h at fixed Cartesian positions.

    No strain is needed: h is an input of the energy, so autograd returns ∂E/∂h exactly, also
    for flat cells, open axes, and energies that are not invariant under rotations. Rounding errors
    do not depend on the distance from the origin, because a module uses differences of positions.
    """

    casts: Final[bool]
    precision: torch.Tensor

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        self.display_name = name_of(module)
        dtype = weights_dtype(module)
        self.casts = dtype is not None
        # Follows `.to(dtype)` and `.double()`, as the weights do.
        self.register_buffer("precision", torch.zeros((), dtype=dtype), persistent=False)
        cutoff = getattr(module, "cutoff", None)
        if cutoff is not None:
            self.cutoff = float(cutoff)
        species = species_of(module)
        if species is not None:
            self.species = list(species)
        self.training = module.training  # `train()` would change parts of the caller's module

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Evaluates the energy and differentiates it.

        Args:
            input: an `AtomGraphInput` of tensors.

        Returns:
            `energy (B,)` in eV, `position_gradients (N, 3)` and `cell_gradients (B, 3, 3)` in eV/Å,
            in the positions' dtype. Zeros where the energy does not depend on an input. If `pos`
            or `cell` requires grad, they are differentiable.

        Raises:
            RuntimeError: autograd is off.
        """
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "torchcall: with_gradients: expected requires_grad=True, got requires_grad=False, "
                "or a call under torch.no_grad()"
            )
        dtype = input["pos"].dtype
        work = self.precision.dtype if self.casts else dtype
        # The gradients are differentiable if an input is to be differentiated.
        again = input["pos"].requires_grad or input["cell"].requires_grad
        pos = _differentiated(input["pos"], work)
        cell = _differentiated(input["cell"], work)
        graph = input.copy()
        # Not leaves: autograd forbids writes to leaves, and the module may write to its input.
        graph["pos"] = pos.clone()
        graph["cell"] = cell.clone()
        for key in ("cell_offsets", "charge", "spin"):
            graph[key] = input[key].to(work)
        out = self.module(graph)
        energy = out if isinstance(out, torch.Tensor) else out["energy"]
        by_position: torch.Tensor | None = None
        by_cell: torch.Tensor | None = None
        if energy.requires_grad:
            gradients = torch.autograd.grad(
                [energy.sum()], [pos, cell], create_graph=again, allow_unused=True
            )
            by_position, by_cell = gradients[0], gradients[1]
        # Made where they are needed: they would take memory and time in every call.
        if by_position is None:
            by_position = torch.zeros_like(pos)
        if by_cell is None:
            by_cell = torch.zeros_like(cell)
        if again:
            # Constant gradients have derivatives too, zero: let all depend on both inputs.
            nothing = pos[:0].sum() + cell[:0].sum()
            by_position = by_position + nothing
            by_cell = by_cell + nothing
        else:
            energy = energy.detach()
        return {
            "energy": energy.to(dtype),
            "position_gradients": by_position.to(dtype),
            "cell_gradients": by_cell.to(dtype),
        }


def _differentiated(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The input in this dtype, requiring grad; part of the caller's graph if it has one."""
    if x.requires_grad:
        return x.to(dtype)
    return x.detach().to(dtype).requires_grad_(True)


def with_gradients(module: torch.nn.Module) -> EnergyGradients:
    """A module that returns the energies of `module` and their gradients, a `TorchMliapForward`.

    Pass it to `TorchMliap.from_module`, or use `TorchMliap.from_energy`, which does so. It can be
    scripted if `module` can (`torch.jit.script`, `e3nn.util.jit.script`), compiled by
    `torchcall.mliap.compile`, pickled and captured into a CUDA graph. (`torch.export.export` itself
    refuses the derivatives of some operations.)

    Args:
        module: maps an `AtomGraphInput` of tensors to the energies `(B,)` in eV of all systems, or
            to a dict that contains them as `energy`. It must not differentiate or detach them.
            It is not copied and remains in its mode; its weights should not require gradients.

    Returns:
        The module. Its attributes `cutoff` and `species` are those of `module`, if it has them.
        Inputs are cast to the dtype of the weights if all parameters have the same, float32 or
        float64; outputs have the dtype of `pos`.
    """
    if not isinstance(module, torch.nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"torchcall: with_gradients: module: expected a torch.nn.Module, got {got}")
    return EnergyGradients(module)


def weights_dtype(module: Any) -> torch.dtype | None:
    """The dtype of a module's parameters, if all have the same, float32 or float64; else None.

    Buffers are not considered: they often contain constants, which promote in operations.
    """
    if not isinstance(module, torch.nn.Module):
        return None
    found = {p.dtype for p in module.parameters() if p.dtype.is_floating_point}
    dtype = found.pop() if len(found) == 1 else None
    return dtype if dtype in (torch.float32, torch.float64) else None
