"""The function that is compiled: energy, position gradients and lattice gradients."""

from collections.abc import Callable, Sequence

import torch

from torchcall._compile._copy import copy_of
from torchcall._compile._errors import CompileError, message_of
from torchcall._compile._metadata import dtype_name
from torchcall._undocumented.of_torch import write_count
from torchcall.mliap._compile._form import INPUTS, OUTPUTS, B, Graph, N, shape_of, sizes_of
from torchcall.mliap._energy_torch import weights_dtype, with_gradients
from torchcall.mliap._outputs import Followed, check_attached, check_outputs, checked_energy

Evaluate = Callable[[Graph], dict[str, torch.Tensor]]


class PotentialModule:
    """A module's energies and gradients, in one of two ways.

    If a module returns `position_gradients`, its gradients are used. Otherwise its energies are
    differentiated, see `EnergyGradients`.

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
        self._derived = with_gradients(self.module).to(device)
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
        dtype, sizes = weights_dtype(self.module) or self.dtype, sizes_of(example)
        inputs = {
            key: value.to(dtype, copy=True) if value.is_floating_point() else value.clone()
            for key, value in example.items()
        }
        leaves = [inputs[key].requires_grad_(True) for key in ("pos", "cell")]
        # Not leaves: autograd forbids in-place writes to leaves, and the module may write to them.
        inputs |= {"pos": leaves[0] * 1, "cell": leaves[1] * 1}
        tensors = dict(inputs)
        versions = {key: write_count(tensor) for key, tensor in tensors.items()}
        with torch.enable_grad(), Followed(inputs["pos"], inputs["cell"]) as followed:
            out = self.module(inputs)
        self._writes = any(write_count(t) != versions[key] for key, t in tensors.items())
        self.differentiates = isinstance(out, dict) and "position_gradients" in out
        if self.differentiates:
            self.cell_gradients = "cell_gradients" in out
        else:
            energy = checked_energy(self.name, out, n_atoms=sizes[N], n_systems=sizes[B])
            check_attached(self.name, energy, followed)
        result = self.evaluate(example)
        check_finite(self.name, result, example)
        return result

    def outputs(self) -> list[str]:
        """The keys of the results."""
        return list(OUTPUTS) if self.cell_gradients else list(OUTPUTS)[:2]

    def evaluate(self, graph: Graph) -> dict[str, torch.Tensor]:
        """Energies and gradients, by eager torch."""
        tensors = [graph[key].clone() for key in INPUTS]
        with torch.enable_grad():
            return dict(zip(self.outputs(), self.flat(*tensors), strict=True))

    def flat(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Maps the inputs, in order, to the outputs, in order. This function is traced."""
        found = (value.detach() for value in self._results(tensors))
        return tuple(value.to(self.dtype).contiguous() for value in found)

    def differentiable(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`flat`, with outputs that are differentiable in those inputs that require grad."""
        return [value.to(self.dtype).contiguous() for value in self._results(tensors)]

    def _results(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        graph = dict(zip(INPUTS, tensors, strict=True))
        if self._writes:  # otherwise the package would write to the caller's memory
            graph = {key: tensor.clone() for key, tensor in graph.items()}
        result = self._own_gradients(graph) if self.differentiates else self._derived(graph)
        return [result[key] for key in self.outputs()]

    def _own_gradients(self, graph: Graph) -> dict[str, torch.Tensor]:
        out = self.module(dict(graph))
        shapes = {key: shape_of(OUTPUTS[key], sizes_of(graph)) for key in self.outputs()}
        check_outputs(self.name, out, shapes)
        return out


def check_finite(name: str, result: dict[str, torch.Tensor], graph: Graph) -> None:
    """Checks results per atom or per system for the example.

    Only those of real systems: callers do not see phantoms, the rows of the last system.

    Raises:
        CompileError: one is not finite.
    """
    real = graph["cell"].shape[0] - 1
    n_atoms = int((graph["batch"] < real).sum())
    for key, value in result.items():
        per_atom = value.shape == graph["pos"].shape
        rows = n_atoms if per_atom else real
        bad = ~torch.isfinite(value[:rows]).reshape(rows, -1).all(1)
        if bool(bad.any()):
            where = f"{'atom' if per_atom else 'system'} {int(bad.nonzero()[0])}"
            raise CompileError(
                f"torchcall: {name}: output [{key!r}]: expected finite numbers for the example, "
                f"got NaN or infinity for {where}"
            )


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
