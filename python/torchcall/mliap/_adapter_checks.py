"""Checks of the lists that the adapters convert."""

from typing import Any

import jax.numpy as jnp
import numpy as np


def is_half(i: Any, j: Any, shifts: Any) -> Any:
    """Whether most of (S, j − i) have the same sign, in lexicographic order; NumPy or JAX arrays.

    In a full list, as many are positive as negative, but for rounding of pairs at the cutoff.
    """

    def sign(x: Any) -> Any:
        return (x > 0).astype(np.int32) - (x < 0).astype(np.int32)

    x, y, z = (sign(shifts[:, k]) for k in range(3))
    signs = sign(8 * x + 4 * y + 2 * z + sign(j - i))
    return 4 * abs(signs.sum()) > abs(signs).sum()


def check_integers(where: str, **arrays: Any) -> None:
    """Raises TypeError if an array has another kind of dtype."""
    for name, value in arrays.items():
        if not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{where}: {name}: expected integers, got {value.dtype.name}")


def check_shapes(where: str, **arrays: tuple[Any, tuple[int | None, ...]]) -> None:
    """Raises ValueError if an array has another shape; None in a shape is any length."""
    for name, (value, shape) in arrays.items():
        found = np.shape(value)
        if len(found) != len(shape) or any(
            n is not None and n != m for n, m in zip(shape, found, strict=True)
        ):
            wanted = str(tuple("N" if n is None else n for n in shape)).replace("'", "")
            raise ValueError(f"{where}: {name}: expected shape {wanted}, got {found}")


def check_cutoff(where: str, cutoff: Any) -> None:
    """Raises ValueError unless the cutoff is positive; NaN is not."""
    if isinstance(cutoff, int | float) and not cutoff > 0:
        raise ValueError(f"{where}: cutoff: expected a positive length in Å, got {cutoff}")
