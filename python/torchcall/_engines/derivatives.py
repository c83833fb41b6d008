"""Derivatives of eager models by torch's autograd: csrc/torch/derivatives.h in Python."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode

from torchcall._undocumented.of_torch import BUFFERS, is_view


class GradientError(Exception):
    """A cotangent does not fit its output, or a gradient is missing or has none itself."""


class Differentiable(NamedTuple):
    """An operand as XLA passes it: of the model, or the cotangent of an output."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    name: str


class Derivatives:
    """Vector-Jacobian products, applied one after the other. Immutable.

    Args:
        operands: the model's.
        strict: whether the model differentiates inside, so that a missing gradient is an error. It
            is what a model returns that detaches its inputs or differentiates without
            create_graph, and zero would look right.
        n_parameters: number of operands, the first ones, that are parameters of a module. Forces,
            for example, do not depend on all of them.

    Attributes:
        cotangents: the operands after the model's.
    """

    def __init__(self, operands: list[Differentiable], strict: bool, n_parameters: int = 0) -> None:
        self._operands = operands
        self._strict = strict
        self._n_parameters = n_parameters
        self._levels: list[tuple[list[int], list[int], bool, int]] = []
        self.cotangents: list[Differentiable] = []

    def then(
        self,
        cotangents: list[Differentiable],
        inputs: list[int],
        outputs: list[int],
        keeps_outputs: bool,
    ) -> "Derivatives":
        """These and one more, see `TcDerivative` of csrc/engine.h."""
        result = Derivatives(self._operands, self._strict, self._n_parameters)
        first = len(self._operands) + len(self.cotangents)
        result._levels = [*self._levels, (inputs, outputs, keeps_outputs, first)]
        result.cotangents = [*self.cotangents, *cotangents]
        return result

    def reshaped(self, shapes: list[list[int]]) -> "Derivatives":
        """These with cotangents of other shapes."""
        result = Derivatives(self._operands, self._strict, self._n_parameters)
        result._levels = self._levels
        result.cotangents = [
            operand._replace(shape=tuple(shape))
            for operand, shape in zip(self.cotangents, shapes, strict=True)
        ]
        return result

    def leaves(self, tensors: list[Any]) -> list[Any]:
        """The operands, of which those that any derivative needs require grad.

        So do cotangents whose gradients are differentiated again, see `twice_differentiable`.
        """
        leaves = list(tensors)
        for k, (inputs, outputs, _, first) in enumerate(self._levels):
            again = range(first, first + len(outputs)) if k < len(self._levels) - 1 else ()
            for i in (*inputs, *again):
                leaves[i].requires_grad_()
        return leaves

    def model_inputs(self, leaves: list[Any]) -> list[Any]:
        """What the model gets: copies of leaves, because torch refuses writes to leaves.

        Modules do not write to their parameters.
        """
        return [
            x.clone() if x is not None and x.requires_grad and i >= self._n_parameters else x
            for i, x in enumerate(leaves[: len(self._operands)])
        ]

    def inside(self, leaves: list[Any]) -> AbstractContextManager[Any]:
        """The context in which the model is called."""
        if not self._strict:
            return nullcontext()
        return DifferentiatesInside([x for x in leaves if x is not None and x.requires_grad])

    def gradients(
        self, outputs: tuple[torch.Tensor, ...], leaves: list[Any]
    ) -> tuple[torch.Tensor, ...]:
        """The last product's outputs.

        Raises:
            GradientError: see above.
        """
        for k in range(len(self._levels)):
            outputs = self._apply(k, outputs, leaves)
        return tuple(output.detach() for output in outputs)

    def _apply(
        self, k: int, outputs: tuple[torch.Tensor, ...], leaves: list[Any]
    ) -> tuple[torch.Tensor, ...]:
        inputs, chosen, keeps_outputs, first = self._levels[k]
        operands = [*self._operands, *self.cotangents]
        is_last = k == len(self._levels) - 1
        strict = self._strict and k == 0
        roots, vectors = [], []
        for j, output in enumerate(outputs[i] for i in chosen):
            vector, name = leaves[first + j], operands[first + j].name
            if output.shape != vector.shape:
                raise GradientError(
                    f"{name}: expected the output's shape {tuple(output.shape)}, got "
                    f"{tuple(vector.shape)}"
                )
            if output.requires_grad:
                roots.append(output)
                # JAX's cotangents of complex numbers are the conjugates of torch's gradients.
                vectors.append(vector.to(output.dtype).conj())
            elif strict:
                raise GradientError(
                    f"{name}: expected an output with a gradient, got one without, although the "
                    "model differentiates inside; pass create_graph=True to torch.autograd.grad "
                    "there"
                )
        wrt = [leaves[i] for i in inputs]
        found: tuple[torch.Tensor | None, ...] = (None,) * len(wrt)
        if roots and is_last:
            found = torch.autograd.grad(roots, wrt, vectors, allow_unused=True)
        elif roots:
            checks = [(node, twice_differentiable(node, leaves)) for node in written(roots)]
            handles = [node.register_hook(check) for node, check in checks]
            found = torch.autograd.grad(roots, wrt, vectors, create_graph=True, allow_unused=True)
            for handle in handles:
                handle.remove()
        results = list(outputs) if keeps_outputs else []
        for i, leaf, gradient in zip(inputs, wrt, found, strict=True):
            if gradient is None and strict and i >= self._n_parameters:
                raise GradientError(
                    f"{operands[i].name}: expected outputs that depend on it, got no gradient: the "
                    "model, which differentiates inside, does not use it or detaches it; remove "
                    "detach() there, or pass jax.lax.stop_gradient of it"
                )
            gradient = torch.zeros_like(leaf) if gradient is None else gradient.conj()
            results.append(gradient.to(operands[i].dtype))  # before a cast, it has another dtype
        return tuple(results)


class DifferentiatesInside(TorchFunctionMode):
    """While active, records whether torch's autograd is called from Python.

    A `torch.autograd.Function` whose backward torch cannot differentiate, in a derivative that is
    to be differentiated again, is an error: torch would go on without it.

    Args:
        leaves: the tensors by which outputs are differentiated again.
    """

    found = False
    _calls = (torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward)

    def __init__(self, leaves: list[torch.Tensor]) -> None:
        super().__init__()
        self._leaves = leaves

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.found = self.found or func in self._calls
        if func is not torch.autograd.grad or not kwargs.get("create_graph"):
            return func(*args, **kwargs)
        outputs = args[0] if args else kwargs["outputs"]
        roots = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        if kwargs.get("grad_outputs") is None and len(args) < 3:
            # torch marks a gradient as not differentiable only if its cotangent requires grad.
            kwargs["grad_outputs"] = [torch.ones_like(x, requires_grad=True) for x in roots]
        handles = [
            node.register_hook(twice_differentiable(node, self._leaves)) for node in written(roots)
        ]
        try:
            return func(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()


def written(roots: list[torch.Tensor]) -> Iterator[Any]:
    """The nodes of a graph that are `torch.autograd.Function`s."""
    found: set[Any] = set()
    waiting: list[Any] = [root.grad_fn for root in roots]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        waiting += [following for following, _ in node.next_functions]
        if isinstance(node, BackwardCFunction):
            yield node


def twice_differentiable(node: Any, leaves: list[Any]) -> Callable[[Any, Any], None]:
    """A hook that raises if the node's gradients do not depend on its cotangents.

    torch would go on without them, and second derivatives would be too small or zero. Gradients
    that are zero may be constant. Those of weights are not used.
    """

    def check(gradients: Any, cotangents: Any) -> None:
        if not any(x is not None and x.requires_grad for x in cotangents):
            return
        for gradient, (following, _) in zip(gradients, node.next_functions, strict=False):
            if gradient is None or following is None:
                continue
            leaf = getattr(following, "variable", None)
            if leaf is not None and not any(leaf is x for x in leaves):
                continue
            if gradient.requires_grad:
                constant = gradient.grad_fn is not None and _is_error(gradient.grad_fn)
            else:
                constant = bool(gradient.any())
            if constant:
                name = type(node).__name__.removesuffix("Backward")
                raise GradientError(
                    f"a second derivative, or forward mode: expected a backward of {name} that "
                    "torch can differentiate, got one that it cannot; write it in operations of "
                    "torch, without detach() and once_differentiable, or use first derivatives "
                    "in reverse mode"
                )

    return check


def _is_error(node: Any) -> bool:
    """Whether torch raises when it differentiates this node, as after `once_differentiable`."""
    return node.name().endswith("::Error")


def detach_state(module: Any) -> None:
    """Removes the graph of a call from the buffers and tensors that a module keeps.

    Otherwise it would grow with each call.
    """
    if not isinstance(module, torch.nn.Module):
        return
    for part in module.modules():
        attributes = vars(part)
        for values in (attributes[BUFFERS], attributes):
            for name, value in list(values.items()):
                if not isinstance(value, torch.Tensor) or value.grad_fn is None:
                    continue
                if is_view(value):  # which torch cannot detach in place
                    values[name] = value.detach()
                else:
                    value.detach_()
