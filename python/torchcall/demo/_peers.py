"""Other ways to call a torch module from a jitted JAX function, each as fast as possible.

Each function takes the module and returns `call(*args)` for any pytrees of arrays. All flatten
pytrees at trace time, avoid copies where the interface gives access to memory, cast in torch, use
`inference_mode` unless the module differentiates, and call `forward` directly, which saves the
microsecond of `nn.Module.__call__`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
import torch
from jax.experimental.buffer_callback import buffer_callback

OutputSpec = Any
"""A pytree of `jax.ShapeDtypeStruct`, or a function from the arguments to one."""

Call = Callable[..., Any]


class CallCounter:
    """Counts the calls of a Python function: shows that XLA merged or hoisted none."""

    calls: int = 0


def with_threads(module: Any, threads: int) -> Call:
    """The module's `forward` with that number of torch threads, on whatever thread it is called."""
    forward = _forward(module)

    def call(*args: Any) -> Any:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return forward(*args)

    return call


def pure_callback_call(
    module: Any,
    output_spec: OutputSpec,
    input_spec: Any = None,
    *,
    requires_grad: bool = False,
    counter: CallCounter | None = None,
) -> Call:
    """The module through `jax.pure_callback`: host arrays by DLPack, results as NumPy arrays.

    Args:
        module: A torch module or script function.
        output_spec: The outputs' shapes and dtypes, or a function from the arguments to them.
        input_spec: Pytree prefix of the arguments: a `torch.dtype` to cast to, or None.
        requires_grad: Whether the module differentiates internally.
        counter: Incremented on each call.
    """
    forward, counter = _forward(module), counter or CallCounter()

    def call(*args: Any) -> Any:
        leaves, in_tree, casts = _flatten(args, input_spec)
        specs, out_tree = _specs(output_spec, args)

        def host(*arrays: Any) -> list[np.ndarray]:
            counter.calls += 1
            tensors = [
                _cast(torch.from_dlpack(a), dtype) for a, dtype in zip(arrays, casts, strict=True)
            ]
            with _mode(requires_grad):
                outputs = out_tree.flatten_up_to(forward(*in_tree.unflatten(tensors)))
                return [output.detach().numpy() for output in outputs]

        return out_tree.unflatten(jax.pure_callback(host, specs, *leaves))

    return call


def buffer_callback_call(
    module: Any,
    output_spec: OutputSpec,
    input_spec: Any = None,
    *,
    requires_grad: bool = False,
    counter: CallCounter | None = None,
) -> Call:
    """The module through `buffer_callback`: XLA's buffers by DLPack, results copied into them.

    Arguments as in `pure_callback_call`.
    """
    forward, counter = _forward(module), counter or CallCounter()

    def call(*args: Any) -> Any:
        leaves, in_tree, casts = _flatten(args, input_spec)
        specs, out_tree = _specs(output_spec, args)

        def host(_context: Any, results: Any, *buffers: Any) -> None:
            counter.calls += 1
            tensors = [
                _cast(torch.from_dlpack(b), dtype) for b, dtype in zip(buffers, casts, strict=True)
            ]
            with _mode(requires_grad):
                outputs = out_tree.flatten_up_to(forward(*in_tree.unflatten(tensors)))
                for result, output in zip(results, outputs, strict=True):
                    torch.from_dlpack(result).copy_(output.detach())

        return out_tree.unflatten(buffer_callback(host, specs)(*leaves))

    return call


def wrap_torch2jax_call(
    module: Any,
    output_spec: OutputSpec,
    input_spec: Any = None,
    *,
    requires_grad: bool = False,
    counter: CallCounter | None = None,
) -> Call:
    """The module through the package `wrap_torch2jax`, without its VJP.

    Arguments as in `pure_callback_call`. The package casts to the dtypes of its example tensors.

    Raises:
        ImportError: If the package is not installed.
    """
    from wrap_torch2jax import torch2jax_without_vjp

    forward, counter = _forward(module), counter or CallCounter()

    def call(*args: Any) -> Any:
        leaves, in_tree, casts = _flatten(args, input_spec)
        specs, out_tree = _specs(output_spec, args)

        def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
            counter.calls += 1
            with _mode(requires_grad):
                outputs = out_tree.flatten_up_to(forward(*in_tree.unflatten(tensors)))
                return [output.detach() for output in outputs]

        examples = [
            torch.empty(leaf.shape, dtype=dtype or _torch_dtype(leaf.dtype))
            for leaf, dtype in zip(leaves, casts, strict=True)
        ]
        wrapped = torch2jax_without_vjp(flat, *examples, output_shapes=specs)
        return out_tree.unflatten(wrapped(*leaves))

    return call


def _forward(module: Any) -> Callable[..., Any]:
    return getattr(module, "forward", module)


def _mode(requires_grad: bool) -> AbstractContextManager[Any]:
    return torch.enable_grad() if requires_grad else torch.inference_mode()


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None else tensor.to(dtype)


def _flatten(
    args: tuple[Any, ...], input_spec: Any
) -> tuple[list[Any], Any, list[torch.dtype | None]]:
    leaves, tree = jax.tree.flatten(args)
    casts = jax.tree.leaves(
        jax.tree.broadcast(input_spec, args, is_leaf=_is_none), is_leaf=_is_none
    )
    return leaves, tree, casts


def _specs(
    output_spec: OutputSpec, args: tuple[Any, ...]
) -> tuple[list[jax.ShapeDtypeStruct], Any]:
    return jax.tree.flatten(output_spec(*args) if callable(output_spec) else output_spec)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
