"""The second program of a potential's package: derivatives of its outputs."""

from collections.abc import Callable
from typing import Any

import torch

from torchcall._compile._derivative import VectorJacobianProduct
from torchcall.mliap._compile._form import INPUTS, OUTPUTS, Graph, shape_of, sizes_of
from torchcall.mliap._compile._gradients import Evaluate, PotentialModule, check_finite


class PotentialDerivative:
    """The vector-Jacobian product of a potential's outputs, by positions and cells.

    Attributes:
        name: the module's class.
        dtype: dtype of floats.
        product: maps the inputs and one cotangent per output to the outputs and the gradients.

    Args:
        potential: a potential whose `inspect` has run.
        example: a graph.
        results: the potential's, for the example.

    Raises:
        CompileError: its gradients cannot be differentiated, or not to finite numbers.
    """

    def __init__(
        self, potential: PotentialModule, example: Graph, results: dict[str, torch.Tensor]
    ) -> None:
        self.name = potential.name
        self.dtype = potential.dtype
        self._outputs = potential.outputs()
        by = ["pos", "cell"] if potential.cell_gradients else ["pos"]
        self.product = VectorJacobianProduct(
            potential.name,
            potential.differentiable,
            [(key, example[key]) for key in INPUTS],
            [(f"output [{key!r}]", results[key]) for key in self._outputs],
            [list(INPUTS).index(key) for key in by],
            potential.differentiates,
        )
        self.keys = [*self._outputs, *(f"second derivatives by {key}" for key in by)]
        check_finite(self.name, self.evaluate(example), example)

    def given(self, graph: Graph) -> tuple[torch.Tensor, ...]:
        """The inputs, and random cotangents."""
        generator = torch.Generator().manual_seed(0)
        sizes = sizes_of(graph)
        shapes = [shape_of(OUTPUTS[key], sizes) for key in self._outputs]
        cotangents = [torch.randn(shape, generator=generator) for shape in shapes]
        return *(graph[key] for key in INPUTS), *(c.to(graph["pos"]) for c in cotangents)

    def evaluate(self, graph: Graph) -> dict[str, torch.Tensor]:
        """The product for random cotangents, by eager torch."""
        with torch.enable_grad():
            found = self.product(*(tensor.clone() for tensor in self.given(graph)))
        return dict(zip(self.keys, found, strict=True))

    def function(self, program: Callable[..., Any]) -> Evaluate:
        """A program for the product as a function of a graph, for random cotangents."""

        def evaluate(graph: Graph) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                return dict(zip(self.keys, program(*self.given(graph)), strict=True))

        return evaluate
