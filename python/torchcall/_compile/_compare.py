"""Compares a package's results with those of its module."""

import math
from collections.abc import Callable
from typing import Any

import torch

from torchcall._undocumented.of_torch import tree_leaves, tree_map

# Relative to the largest absolute value. Covers another order of sums and fused multiply-adds.
TOLERANCE = {
    torch.float32: 1e-4,
    torch.float64: 1e-10,
    torch.float16: 2e-2,
    torch.bfloat16: 2e-2,
    torch.complex64: 1e-4,
    torch.complex128: 1e-10,
}


class DifferentError(Exception):
    """A result differs from the module's. The text names the result and the case."""


def compare_results(
    references: list[tuple[str, tuple[Any, ...], list[torch.Tensor]]], evaluate: Callable[..., Any]
) -> None:
    """Compares flat results for several cases.

    Args:
        references: per case: a description, the arguments, the module's results.
        evaluate: the compiled function.

    Raises:
        DifferentError: at the first difference larger than rounding errors.
    """
    for what, args, expected in references:
        try:
            found = tree_leaves(evaluate(*tree_map(torch.clone, args)))
        except Exception as error:
            raise DifferentError(f"fails for {what}: {type(error).__name__}: {error}") from error
        if len(found) != len(expected):
            raise DifferentError(f"expected {len(expected)} results for {what}, got {len(found)}")
        for i, (result, reference) in enumerate(zip(found, expected, strict=True)):
            tolerance = TOLERANCE.get(reference.dtype, 0.0)
            size = largest(reference)
            compare_tensors(f"result {i} for {what}", result, reference, tolerance, size)


def compare_tensors(
    what: str, found: torch.Tensor, expected: torch.Tensor, tolerance: float, size: float
) -> None:
    """Checks that `|found - expected| ≤ tolerance * size`, and that shapes and dtypes are equal.

    Raises:
        DifferentError: they differ.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise DifferentError(f"{what}: expected the module's {_form(expected)}, got {_form(found)}")
    same = torch.isclose(found, expected, rtol=0.0, atol=tolerance * size, equal_nan=True)
    if not bool(same.all()):
        worst = _difference(found, expected)
        raise DifferentError(
            f"{what}: expected the module's result to within {tolerance * size:.1e}, got a "
            f"difference of {worst:.1e}"
        )


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    wide = torch.complex128 if expected.is_complex() else torch.float64
    return float((found.to(wide) - expected.to(wide)).abs().nan_to_num(math.inf).max())


def _form(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def largest(values: torch.Tensor) -> float:
    """The largest finite absolute value."""
    finite = values[torch.isfinite(values)]
    return float(finite.abs().max()) if finite.numel() else 0.0
