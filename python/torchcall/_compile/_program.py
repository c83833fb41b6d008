"""Graphs of operators, traced with fake tensors, as programs for torch's compiler."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from torchcall._compile._errors import Watch, cannot_export
from torchcall._engines.fake_scripts import traceable_scripts
from torchcall._undocumented.of_compiler import PyTreeCodeGen, PyTreeInfo
from torchcall._undocumented.of_torch import trace_fake, tree_flatten


def trace_fakes(
    name: str, stage: str, function: Callable[..., Any], mode: Any, fakes: Sequence[torch.Tensor]
) -> GraphModule:
    """Traces a function of fake tensors into a graph of operators.

    Args:
        name: what errors call the module.
        stage: a participle, see `cannot_export`.
        function: maps tensors to a tuple of tensors.
        mode: the fake tensors'.
        fakes: the arguments.

    Raises:
        ExportError: it cannot be traced.
    """
    watch = Watch()
    try:
        with mode, traceable_scripts(inline_functions=True), watch:
            return trace_fake(function, fakes, decomposition_table=_DECOMPOSITIONS)
    except Exception as error:
        raise cannot_export(name, stage, error, watch) from error


def as_program(
    graph: GraphModule, names: list[str], arguments: tuple[Any, ...], results: Any
) -> GraphModule:
    """The graph as a function of pytrees, as `build` takes it. It is changed.

    Args:
        graph: maps the flat arguments to the flat results.
        names: of the arguments.
        arguments: examples of the sizes with which it was traced.
        results: a pytree of the results' form.
    """
    for name, value in list(vars(graph).items()):  # constants that tracing stored as attributes
        if isinstance(value, torch.Tensor):
            delattr(graph, name)
            graph.register_buffer(name, value.detach())
    _, inputs = tree_flatten((arguments, {}))
    _, outputs = tree_flatten(results)
    graph.graph.set_codegen(PyTreeCodeGen(PyTreeInfo(names, inputs, outputs)))
    graph.recompile()
    graph.meta["example"] = arguments
    return graph


def _addcmul(
    start: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, value: float = 1
) -> torch.Tensor:
    """`aten::addcmul`. torch's own shape function fails if a weight is expanded to a symbol."""
    product = first * second
    return start + (product if value == 1 else value * product)


def _slice_backward(
    gradient: torch.Tensor, sizes: list[int], dim: int, start: int, end: int, step: int
) -> torch.Tensor:
    """`aten::slice_backward`. torch's compiler fails if `[:]` selects all of a symbolic size."""
    # Comparing a symbol would make it a condition of the package.
    constant = isinstance(start, int) and isinstance(end, int)
    if constant and (start, end, step) == (0, _NO_END, 1):
        return gradient.clone()
    zeros = gradient.new_zeros(sizes)
    return torch.slice_scatter(zeros, gradient, dim, start, end, step)


_NO_END = 2**63 - 1
_DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.aten.addcmul.default: _addcmul,
    torch.ops.aten.slice_backward.default: _slice_backward,
}
