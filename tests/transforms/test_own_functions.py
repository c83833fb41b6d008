"""Derivatives of models with operations or state of their own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import error_of
from torch import Tensor, nn
from twins import ENGINES, wrapped

from torchcall import TorchModuleWrapper


class Cube(torch.autograd.Function):
    """A cube whose backward torch can differentiate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, *gradients):
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class Outside(Cube):
    """Its backward leaves torch."""

    @staticmethod
    def backward(ctx, *gradients):
        return 3 * ctx.saved_tensors[0].detach() ** 2 * gradients[0].detach()


class Once(Cube):
    """Its backward says that it cannot be differentiated."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):  # pyright: ignore[reportIncompatibleMethodOverride]
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class Step(torch.autograd.Function):
    """Its backward is a constant, zero."""

    @staticmethod
    def forward(ctx, x):
        del ctx
        return (x > 0.5).to(x.dtype)

    @staticmethod
    def backward(ctx, *gradients):
        del ctx
        return torch.zeros_like(gradients[0])


TWICE = {
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (x,)),
    "reverse over reverse": lambda f: jax.jit(jax.jacrev(jax.jacrev(f))),
}


def in_model(function):
    return TorchModuleWrapper(lambda x: function.apply(x.sin()) * x, output_spec=lambda x: x)


@pytest.mark.parametrize("name", TWICE)
def test_a_backward_that_has_no_gradient_is_an_error_and_not_zero(name):
    x = jnp.arange(3.0)
    expected = TWICE[name](lambda x: jnp.sin(x) ** 3 * x)(x)
    got = TWICE[name](in_model(Cube))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got, expected)
    for function in (Outside, Once):
        f = in_model(function)
        text = error_of(lambda f=f: jax.block_until_ready(TWICE[name](f)(x)))
        assert f"a backward of {function.__name__} that torch can differentiate" in text


@pytest.mark.parametrize("name", TWICE)
def test_a_backward_that_is_zero_has_zero_gradients(name):
    x = jnp.arange(3.0)
    expected = TWICE[name](lambda x: jnp.where(jnp.sin(x) > 0.5, x, 0))(x)
    jax.tree.map(np.testing.assert_array_equal, TWICE[name](in_model(Step))(x), expected)


class Scale(torch.autograd.Function):
    """Its backward is differentiable for the input, and not for the weight."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        return weight * gradients[0], (x * gradients[0]).detach()


def test_weights_need_no_second_derivative():
    weight = nn.Parameter(torch.full((3,), 2.0))
    f = TorchModuleWrapper(lambda x: Scale.apply(x**3, weight), output_spec=lambda x: x)
    x = jnp.arange(3.0)
    np.testing.assert_allclose(jax.jvp(f, (x,), (x,))[1], 6 * x**3)


class Sum(nn.Module):
    """Keeps the sum of what it computed, in a buffer that is changed or replaced."""

    total: Tensor

    def __init__(self, replaces: bool) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        squares = (x * x).sum()
        if self.replaces:
            self.total = self.total + squares
        else:
            self.total += squares
        return squares, 2 * self.total


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_state_keeps_its_values_and_no_graph(engine, replaces):
    module = Sum(replaces)
    if engine == "TorchScript":
        module = torch.jit.script(module)
    f = TorchModuleWrapper(module)
    for calls in (2, 4):  # the values and the gradients
        gradient = jax.grad(lambda x: sum(f(x)))(jnp.ones(3))
        np.testing.assert_array_equal(gradient, np.full(3, 6.0))
        assert float(module.total) == 3 * calls
        assert module.total.is_leaf
        assert not module.total.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
def test_a_program_of_64_bits_is_used_with_x64_off(engine):
    f = wrapped(cube, engine)
    with jax.enable_x64(True):
        x = jnp.arange(3.0)
        linear, pullback = jax.linearize(f, x)[1], jax.vjp(f, x)[1]
    expected = np.asarray([0.0, 3.0, 24.0])
    for got in (linear(x), *pullback(x)):
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected)


def cube(x: Tensor) -> Tensor:
    return x**3


def small(x: Tensor) -> Tensor:
    return (x * 1e-4).pow(2).sum()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scaled_loss_in_float16_does_not_underflow(engine):
    f = wrapped(small, engine)
    gradient = jax.grad(lambda x: jnp.float16(2**15) * f(x))(jnp.ones(2, jnp.float16))
    np.testing.assert_allclose(gradient, 2**15 * 2e-8, rtol=1e-2)
