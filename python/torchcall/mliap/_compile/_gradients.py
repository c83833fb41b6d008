"""The function that is compiled: energy, position gradients and lattice gradients."""

from collections.abc import Callable
from typing import Any

import torch

from torchcall._compile._copy import copy_of
from torchcall._compile._errors import CompileError, message_of
from torchcall._compile._metadata import dtype_name
from torchcall.mliap._compile._form import INPUTS, OUTPUTS, Graph, shape_of, sizes_of
from torchcall.mliap._lattice_torch import centred, lattice_gradient_from_virial

Evaluate = Callable[[Graph], dict[str, torch.Tensor]]


class PotentialModule:
    """A module's energies and gradients, in one of two ways.

    If a module returns `position_gradients`, its gradients are used. Otherwise the energy is
    differentiated here by the positions and by a symmetric strain ε of each system,
    `r → r + r @ ε`, `h → h + h @ ε`, at ε = 0:

        position_gradients = ∂E/∂r,    cell_gradients = h⁻ᵀ (∂E/∂ε − Σ r ⊗ ∂E/∂r).

    r is measured from the system's mean position, to reduce rounding errors far from the origin.

    Attributes:
        name: the module's class.
        module: a copy of the caller's, in eval mode, with constant weights.
        differentiates: whether the module returns gradients itself.
        cell_gradients: whether the outputs include cell gradients.
        dtype: dtype of float inputs and outputs.
    """

    def __init__(self, module: object, dtype: torch.dtype | None, device: torch.device) -> None:
        self.name = type(module).__name__
        self.module = copy_of(module, self.name, dtype, device)
        self.was_training = bool(getattr(module, "training", False))
        self.differentiates = False
        self.cell_gradients = True
        self.dtype = dtype or torch.float32
        self._writes = False

    def inspect(self, example: Graph) -> dict[str, torch.Tensor]:
        """Runs the module on the example and records the form of its outputs.

        Returns:
            The results for the example.

        Raises:
            TypeError, ValueError: an output has a wrong key, type, shape or dtype.
            CompileError: the module fails, or its results are not finite.
        """
        self.dtype = example["pos"].dtype
        inputs = {key: value.clone() for key, value in example.items()}
        inputs["pos"].requires_grad_(True)
        pos, tensors = inputs["pos"], dict(inputs)
        # Not a leaf: autograd forbids in-place writes to leaves, and the module may write to it.
        inputs["pos"] = pos * 1
        tensors["pos"] = inputs["pos"]
        versions = {key: tensor._version for key, tensor in tensors.items()}
        with torch.enable_grad():
            out = self.module(inputs)
            self._writes = any(t._version != versions[key] for key, t in tensors.items())
            self.differentiates = isinstance(out, dict) and "position_gradients" in out
            if self.differentiates:
                self.cell_gradients = "cell_gradients" in out
            else:
                self._check_energy(out, example)
        result = self.evaluate(example)
        self._check_finite(result, example)
        return result

    def outputs(self) -> list[str]:
        """The keys of the results."""
        return list(OUTPUTS) if self.cell_gradients else list(OUTPUTS)[:2]

    def evaluate(self, graph: Graph) -> dict[str, torch.Tensor]:
        """Energies and gradients, by eager torch."""
        tensors = [graph[key].clone() for key in INPUTS]
        with torch.enable_grad():
            return dict(zip(self.outputs(), self.flat(*tensors), strict=True))

    def reference(self, graph: Graph) -> dict[str, torch.Tensor]:
        """`evaluate`, but with position gradients from the energy directly, without a strain."""
        result = self.evaluate(graph)
        if self.differentiates:
            return result
        inputs = {key: value.clone() for key, value in graph.items()}
        with torch.enable_grad():
            pos = inputs["pos"].requires_grad_(True)
            inputs["pos"] = pos * 1
            energy = _energy_of(self.module(inputs))
            (gradient,) = torch.autograd.grad(energy.sum(), pos)
        return result | {
            "energy": energy.detach().to(self.dtype),
            "position_gradients": gradient.to(self.dtype),
        }

    def flat(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps the inputs, in order, to the outputs, in order. This function is traced."""
        graph = dict(zip(INPUTS, tensors, strict=True))
        if self._writes:  # otherwise the package would write to the caller's memory
            graph = {key: tensor.clone() for key, tensor in graph.items()}
        result = self._own_gradients(graph) if self.differentiates else self._autograd(graph)
        return tuple(result[key].detach().to(self.dtype).contiguous() for key in self.outputs())

    def _own_gradients(self, graph: Graph) -> dict[str, torch.Tensor]:
        out = self.module(dict(graph))
        if not isinstance(out, dict):
            raise TypeError(self._output(f"expected a dict, got {type(out).__name__}"))
        for key in self.outputs():
            if key not in out:
                raise ValueError(self._output(f"expected the key {key!r}, got {sorted(out)}"))
            self._check_tensor(key, out[key], graph)
        return out

    def _autograd(self, graph: Graph) -> dict[str, torch.Tensor]:
        cell, batch = graph["cell"], graph["batch"]
        pos = graph["pos"].detach().requires_grad_(True)
        strain = torch.zeros_like(cell).requires_grad_(True)
        symmetric = 0.5 * (strain + strain.transpose(1, 2))
        arms = centred(pos, batch, cell.size(0))
        moved = pos + (arms.unsqueeze(2) * symmetric.index_select(0, batch)).sum(1)
        lattice = cell + (cell.unsqueeze(3) * symmetric.unsqueeze(1)).sum(2)
        energy = _energy_of(self.module(graph | {"pos": moved, "cell": lattice}))
        gradient, virial = torch.autograd.grad(energy.sum(), [pos, strain])
        by_cell = lattice_gradient_from_virial(
            -gradient, graph["pos"], batch, cell, virial, graph["pbc"]
        )
        return {"energy": energy, "position_gradients": gradient, "cell_gradients": by_cell}

    def _check_energy(self, out: Any, graph: Graph) -> None:
        if isinstance(out, dict) and "energy" not in out:
            raise ValueError(
                self._output(f"expected the key 'energy', got {sorted(map(str, out))}")
            )
        energy = _energy_of(out)
        self._check_tensor("energy", energy, graph)
        if not energy.requires_grad:
            raise ValueError(
                self._output(
                    "expected an energy that autograd can differentiate by 'pos', got a detached "
                    "one (computed under no_grad, or without the positions); a module that "
                    "differentiates inside must return 'position_gradients' too"
                )
            )

    def _check_tensor(self, key: str, value: Any, graph: Graph) -> None:
        if not isinstance(value, torch.Tensor):
            raise TypeError(self._output(f"[{key!r}]: expected a tensor, got {_kind(value)}"))
        expected = shape_of(OUTPUTS[key], sizes_of(graph))
        if tuple(value.shape) != expected:
            raise ValueError(
                self._output(f"[{key!r}]: expected shape {expected}, got {tuple(value.shape)}")
            )
        if not value.dtype.is_floating_point:
            raise TypeError(
                self._output(f"[{key!r}]: expected floats, got {dtype_name(value.dtype)}")
            )

    def _check_finite(self, result: dict[str, torch.Tensor], graph: Graph) -> None:
        """Checks real systems only: callers do not see phantoms, the rows of the last system."""
        real = graph["cell"].shape[0] - 1
        for key, value in result.items():
            rows = int((graph["batch"] < real).sum()) if key == "position_gradients" else real
            bad = ~torch.isfinite(value[:rows]).reshape(rows, -1).all(1)
            if bool(bad.any()):
                what = "atom" if key == "position_gradients" else "system"
                raise CompileError(
                    f"torchcall: {self.name}: output [{key!r}]: expected finite numbers for the "
                    f"example, got NaN or infinity for {what} {int(bad.nonzero()[0])}"
                )

    def _output(self, text: str) -> str:
        space = "" if text.startswith("[") else ": "
        return f"torchcall: {self.name}: output{space if space else ' '}{text}"


def failed_on_example(potential: PotentialModule, error: Exception, example: Graph) -> CompileError:
    """The error for a module that fails on the example, before compilation."""
    weights = {t.dtype for t in potential.module.parameters() if t.dtype.is_floating_point}
    found, given = ", ".join(sorted(map(dtype_name, weights))), dtype_name(example["pos"].dtype)
    hint = ""
    if weights and weights != {example["pos"].dtype}:
        hint = f" Its weights are {found} and its input {given}: dtype='{given}' casts the weights."
    if "second time" in str(error):
        hint += " A module that differentiates inside must return 'position_gradients' = -forces."
    return CompileError(
        f"torchcall: {potential.name}: compile: expected a module that can be called with an "
        f"AtomGraphInput, got one that fails on the example.{hint}\n{message_of(error)}"
    )


def _energy_of(out: Any) -> Any:
    return out["energy"] if isinstance(out, dict) else out


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
