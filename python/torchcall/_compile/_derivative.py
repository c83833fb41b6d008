"""The second program of a package with gradients: a module's vector-Jacobian product."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from torchcall._compile._build import require_all_sizes
from torchcall._compile._errors import CompileError, SpecialisedError, message_of
from torchcall._compile._metadata import dtype_name
from torchcall._compile._program import as_program, trace_fakes
from torchcall._engines.derivatives import DifferentiatesInside
from torchcall._undocumented.of_torch import detect_fake_mode, tree_leaves, tree_map

Named = list[tuple[str, torch.Tensor]]


def chosen_inputs(gradients: object, args: tuple[Any, ...]) -> list[int]:
    """The flat arguments that the option `gradients` of `torchcall.compile` selects.

    Raises:
        TypeError, ValueError: the option has another value, or selects no float array.
    """
    expected = "torchcall: compile: gradients: expected True, or positions of arguments"
    if gradients is None or gradients is False:
        return []
    positions: Any = range(len(args)) if gradients is True else gradients
    if isinstance(positions, int):
        positions = (positions,)
    if not isinstance(positions, Sequence) or isinstance(positions, str):
        raise TypeError(f"{expected}, got {gradients!r}")
    if not all(type(i) is int for i in positions):
        raise TypeError(f"{expected}, got {gradients!r}")
    for i in positions:
        if not 0 <= i < len(args):
            raise ValueError(f"{expected} from 0 to {len(args) - 1}, got {gradients!r}")
    chosen, first = [], 0
    for i, arg in enumerate(args):
        leaves = tree_leaves(arg)
        own = [first + k for k, leaf in enumerate(leaves) if leaf.dtype.is_floating_point]
        if i in positions:
            if not own and gradients is not True:
                raise ValueError(f"{expected} with arrays of floats, got {i}, which has none")
            chosen += own
        first += len(leaves)
    if not chosen:
        raise ValueError(f"{expected} with arrays of floats, got a module without such arguments")
    return chosen


class VectorJacobianProduct:
    """`(inputs, cotangents) → (outputs, gradients of Σ ⟨cotangent, output⟩)`, on flat tuples.

    Every output of floats has a cotangent.

    Args:
        name: the module's class.
        module: maps the flat inputs to the flat outputs.
        inputs: examples, with their names.
        outputs: the module's, with their names.
        chosen: the inputs with respect to which.
        differentiates: whether the module differentiates inside; None: whether it calls torch's
            autograd from Python.

    Raises:
        TypeError: an output is complex.
        CompileError: autograd cannot differentiate the module on the example.
    """

    def __init__(
        self,
        name: str,
        module: Callable[[list[torch.Tensor]], list[torch.Tensor]],
        inputs: Named,
        outputs: Named,
        chosen: list[int],
        differentiates: bool | None = None,
    ) -> None:
        self._name = name
        self._differentiates = differentiates
        self._module = module
        self._inputs = inputs
        self._chosen = chosen
        for output, value in outputs:
            if value.is_complex():
                raise TypeError(
                    f"torchcall: {name}: {output}: expected real numbers from a module that is "
                    f"compiled with gradients, got {dtype_name(value.dtype)}"
                )
        self._floats = [output for output, value in outputs if value.is_floating_point()]
        self._check()

    @property
    def gradients(self) -> list[str]:
        """The names of the chosen inputs."""
        return [self._inputs[i][0] for i in self._chosen]

    def __call__(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The product."""
        given, leaves = self._with_leaves(tensors[: len(self._inputs)])
        outputs = self._module(given)
        found = self._differentiated(outputs, leaves, tensors[len(self._inputs) :])
        gradients = [
            torch.zeros_like(leaf) if gradient is None else gradient
            for leaf, gradient in zip(leaves, found, strict=True)
        ]
        return tuple(tensor.detach() for tensor in (*outputs, *gradients))

    def case(
        self, args: tuple[Any, ...], results: list[torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], list[torch.Tensor]]:
        """Arguments and results of the product, by eager torch, for a call of the module."""
        generator = torch.Generator().manual_seed(0)
        cotangents = [
            torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            for value in results
            if value.is_floating_point()
        ]
        given = (*tree_leaves(args), *cotangents)
        return given, list(self(*tree_map(torch.clone, given)))

    def trace(self, program: ExportedProgram) -> GraphModule:
        """Traces the product for the sizes that an exported program of the module has.

        Raises:
            SpecialisedError: it is valid for fewer sizes.
            CompileError: it cannot be traced.
        """
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        signature = program.graph_signature
        inputs = [values[str(name)] for name in signature.user_inputs]
        outputs = [values[str(name)] for name in signature.user_outputs]
        mode: Any = detect_fake_mode(inputs)
        with mode:
            cotangents = [
                torch.empty(value.shape, dtype=value.dtype, device=value.device)
                for value in outputs
                if value.is_floating_point()
            ]
        sizes = str([value.shape for value in inputs])
        graph = trace_fakes(self._name, "differentiated", self, mode, [*inputs, *cotangents])
        if str([value.shape for value in inputs]) != sizes:
            raise SpecialisedError("the gradients fix a size that the module does not")
        require_all_sizes(graph)
        example = [value for _, value in self._inputs]
        given, results = self.case(tuple(example), self._module(_cloned(example)))
        return as_program(graph, [f"input{i}" for i in range(len(given))], given, tuple(results))

    def _with_leaves(
        self, inputs: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The inputs, of which the chosen ones are leaves that require grad; and these."""
        given = list(inputs)
        for i in self._chosen:
            given[i] = given[i].detach().requires_grad_()
        return given, [given[i] for i in self._chosen]

    def _differentiated(
        self,
        outputs: list[torch.Tensor],
        leaves: list[torch.Tensor],
        cotangents: Sequence[torch.Tensor],
    ) -> tuple[torch.Tensor | None, ...]:
        floats = [output for output in outputs if output.is_floating_point()]
        pairs = [(x, c) for x, c in zip(floats, cotangents, strict=True) if x.requires_grad]
        if not pairs:
            return (None,) * len(leaves)
        roots, vectors = zip(*pairs, strict=True)
        return torch.autograd.grad(roots, leaves, vectors, allow_unused=True)

    def _check(self) -> None:
        """Differentiates the module on the example.

        If the module differentiates inside, a missing gradient is an error: such modules detach
        their inputs or do not pass create_graph, and zero would look right.
        """
        where = f"torchcall: {self._name}: compile: gradients"
        advice = "; pass create_graph=True to torch.autograd.grad, and do not detach"
        try:
            given, leaves = self._with_leaves(_cloned([value for _, value in self._inputs]))
            with DifferentiatesInside(leaves) as inside:
                outputs = self._module(given)
            floats = [output for output in outputs if output.is_floating_point()]
            found = self._differentiated(outputs, leaves, [torch.ones_like(x) for x in floats])
        except Exception as error:
            raise CompileError(
                f"{where}: expected a module that autograd can differentiate, got an error"
                f"{advice if 'second time' in str(error) else ''}\n{message_of(error)}"
            ) from error
        differentiates = inside.found if self._differentiates is None else self._differentiates
        if differentiates:
            for name, output in zip(self._floats, floats, strict=True):
                if not output.requires_grad:
                    raise CompileError(
                        f"{where}: {name}: expected an output with a gradient, got one without, "
                        f"although the module differentiates inside{advice}"
                    )
        missing = [name for name, x in zip(self.gradients, found, strict=True) if x is None]
        if missing and (differentiates or len(missing) == len(found)):
            raise CompileError(
                f"{where}: {missing[0]}: expected outputs that autograd can differentiate with "
                "respect to it, got outputs that do not depend on it, or are detached"
                f"{advice if differentiates else ''}"
            )


def _cloned(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]
