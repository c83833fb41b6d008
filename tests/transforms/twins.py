"""Modules and the same functions in JAX, which the transformations are compared with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchcall

ENGINES = ("TorchScript", "eager")
ROWS = np.array([0, 2, 1, 2])


class Mixed(nn.Module):
    """Of a matrix, a vector and integers: a vector, a matrix and integers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))

    def forward(self, x: Tensor, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.tanh(x @ self.weight.t()).sum(-1) * y.exp().sum()
        return hidden, x.sin()[rows] * y.sum(), rows + 1


def mixed_in_jax(x: Any, y: Any, rows: Any) -> tuple[Any, Any, Any]:
    """`Mixed`, with its weights."""
    weight = Mixed().weight.detach().numpy()
    hidden = jnp.tanh(x @ weight.T).sum(-1) * jnp.exp(y).sum()
    return hidden, jnp.sin(x)[rows] * y.sum(), rows + 1


class Number(nn.Module):
    """One number."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return (x.sin() * y.exp()).sum() + (x**3).sum()


def number_in_jax(x: Any, y: Any) -> Any:
    """`Number`."""
    return (jnp.sin(x) * jnp.exp(y)).sum() + (x**3).sum()


def wrapped(module: Any, engine: str, **options: Any) -> torchcall.TorchModuleWrapper:
    """The module or function as TorchScript or eager."""
    if engine == "TorchScript":
        module = torch.jit.script(module)
    return torchcall.TorchModuleWrapper(module, **options)


def random(*shape: int, seed: int = 0) -> jax.Array:
    """Normal numbers in float64."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def assert_close(got: Any, expected: Any) -> None:
    """Same structure, shapes and dtypes; equal to rounding in float64."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.dtype != jax.dtypes.float0:
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def total(f: Any) -> Any:
    """A number of `Mixed`, a function of its matrix and vector."""

    def scalar(x: Any, y: Any) -> Any:
        vector, matrix, _ = f(x, y, ROWS)
        return vector.sum() + (matrix**2).sum()

    return scalar


def floats(f: Any) -> Any:
    """The outputs of `Mixed` that are differentiable, a function of its matrix and vector."""
    return lambda x, y: f(x, y, ROWS)[:2]


def assert_transforms(transform: Any, engine: str) -> None:
    """A transform of a call of `Mixed` is that of the function in JAX."""
    arguments = random(3, 3), random(2, seed=1)
    got = transform(wrapped(Mixed(), engine))(*arguments)
    assert_close(got, transform(mixed_in_jax)(*arguments))


def cases(transforms: dict[str, Any], *quick: str, slow: tuple[str, ...] = ()) -> list[Any]:
    """Each engine and name. Eager models differ from TorchScript in a call, not in JAX's rules.

    So eager models have slow tests only, except of `quick`.
    """

    def is_quick(engine: str, name: str) -> bool:
        return name not in slow and (engine == "TorchScript" or name in quick)

    return [
        pytest.param(engine, name, marks=() if is_quick(engine, name) else pytest.mark.slow)
        for engine in ENGINES
        for name in transforms
    ]
