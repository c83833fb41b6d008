"""Supported arguments: arrays, static Python values, and the dtypes that JAX and torch share."""

from collections.abc import Iterable
from typing import Any, TypeGuard

import jax
import numpy as np
import torch
from jax.core import Tracer

from torchcall import _bridge
from torchcall._undocumented.of_jax import is_constant

DTYPE_NAMES = frozenset(_bridge.dtype_names())
STATIC_TYPES = (bool, int, float, str, type(None))


def type_name(value: object) -> str:
    """The name of a value's type, for errors."""
    return type(value).__name__


def is_static(value: object) -> TypeGuard[bool | int | float | str | None]:
    """Whether a leaf is a Python value that reaches the model unchanged."""
    return isinstance(value, STATIC_TYPES) and not isinstance(value, np.generic)


def any_traced(leaves: Iterable[object]) -> bool:
    """Whether an array belongs to a program that is being traced."""
    return any(isinstance(leaf, Tracer) for leaf in leaves)


def is_symbolic(size: object) -> bool:
    """Whether a size is symbolic, as `jax.export` has them."""
    return not isinstance(size, int | np.integer)


def static_key(value: bool | int | float | str | None) -> tuple[str, str]:
    """A key that differs for 1, True and 1.0, and for 0.0 and -0.0, and is equal for NaNs."""
    return type_name(value), value.hex() if isinstance(value, float) else repr(value)


def shape_dtype(name: str, value: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an operand in a program.

    Raises:
        TypeError: the value is not an array, or torch or JAX lack its dtype.
    """
    if isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a JAX or NumPy array, got a torch.Tensor")
    if not is_constant(value) and not isinstance(value, jax.Array | np.ndarray | np.generic):
        raise TypeError(
            f"{name}: expected an array or a Python scalar (int, float, bool, str, None), "
            f"got {type_name(value)}"
        )
    try:
        dtype = jax.typeof(value).dtype  # as a jitted function would take it
    except TypeError:
        dtype = value.dtype
    if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"{name}: expected numbers, got a random key, {dtype}; pass jax.random.key_data(key), "
            "or numbers that are drawn with the key"
        )
    if str(dtype) not in DTYPE_NAMES:
        raise TypeError(
            f"{name}: expected one of the dtypes that JAX and torch share "
            f"({', '.join(sorted(DTYPE_NAMES))}), got {dtype}"
        )
    return jax.ShapeDtypeStruct(np.shape(value), jax.dtypes.canonicalize_dtype(dtype))


def torch_dtype_name(dtype: torch.dtype) -> str:
    """NumPy's name of a torch dtype: torch.int64 → 'int64'."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a NumPy name."""
    return getattr(torch, name)


def describe(spec: Any) -> str:
    """float32 (4,)"""
    return f"{spec.dtype} {tuple(spec.shape)}"


def path_name(root: str, path: tuple[Any, ...]) -> str:
    """operand args[0]['pos'], operand kwargs['x'], output ['energy']."""
    return root + jax.tree_util.keystr(path)
