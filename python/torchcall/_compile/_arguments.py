"""The example's arrays as tensors."""

from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from torchcall._call.specs import DTYPE_NAMES, torch_dtype
from torchcall._call.tree import check_keys
from torchcall._compile._metadata import dtype_name
from torchcall._undocumented.of_torch import (
    keystr,
    tree_flatten_with_path,
    tree_structure,
    tree_unflatten,
)


def example_of(example: Any, device: torch.device) -> tuple[Any, ...]:
    """A copy of the example, as tensors on the device.

    Raises:
        TypeError: it is not a tuple of pytrees of arrays; the message names the leaf.
        ValueError: a dict has keys of two types.
    """
    expected = "torchcall: compile: example: expected a tuple of the positional arguments"
    if type(example) is not tuple:
        raise TypeError(f"{expected}, got {type(example).__name__}")
    check_keys(example, "torchcall: compile: example")
    leaves = named("example", example)
    if not leaves:
        raise TypeError(f"{expected} with at least one array, got none")
    tensors = [_tensor(name, leaf).to(device).contiguous() for name, leaf in leaves]
    return tree_unflatten(tensors, tree_structure(example))


def _tensor(name: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if dtype_name(value.dtype) in DTYPE_NAMES:
            return value.detach().clone()
        got = f"dtype {dtype_name(value.dtype)}"
    elif isinstance(value, Tracer):
        got = "a traced one; compile outside jit"
    elif isinstance(value, jax.Array | np.ndarray | np.generic):
        array = np.array(value)
        if str(array.dtype) in DTYPE_NAMES:
            held = array.astype(np.float32) if array.dtype == jax.numpy.bfloat16 else array
            return torch.from_numpy(np.atleast_1d(held)).reshape(held.shape).to(
                torch_dtype(str(array.dtype))
            )  # fmt: skip
        got = f"dtype {array.dtype}"
    else:
        got = type(value).__name__
    raise TypeError(
        f"torchcall: compile: {name}: expected an array of a dtype that JAX and torch share, got "
        f"{got}"
    )


def named(root: str, tree: Any) -> list[tuple[str, Any]]:
    """Leaves with their paths, in torch's order."""
    pairs, _ = tree_flatten_with_path(tree)
    return [(root + keystr(path), leaf) for path, leaf in pairs]
