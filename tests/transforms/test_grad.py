"""Reverse mode: `grad`, `vjp` and `jacrev` of a call against those of the function in JAX."""

import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import Spring, error_of
from torch import Tensor
from twins import (
    ENGINES,
    ROWS,
    Mixed,
    Number,
    assert_close,
    assert_transforms,
    cases,
    floats,
    mixed_in_jax,
    number_in_jax,
    random,
    total,
    wrapped,
)

from torchcall import TorchModuleWrapper, _bridge

pytestmark = pytest.mark.usefixtures("x64")

REVERSE = {
    "grad": lambda f: jax.grad(total(f)),
    "grad by the second": lambda f: jax.grad(total(f), 1),
    "value_and_grad under jit": lambda f: jax.jit(jax.value_and_grad(total(f), (0, 1))),
    "vjp of both outputs": lambda f: lambda x, y: jax.vjp(floats(f), x, y)[1](floats(f)(x, y)),
    "vjp of one output": lambda f: lambda x, y: jax.vjp(lambda x: f(x, y, ROWS)[1], x)[1](x[ROWS]),
    "jacrev": lambda f: jax.jacrev(floats(f), (0, 1)),
    "custom_vjp around it": lambda f: jax.grad(lambda x, y: halved(total(f))(x, y)),
}


def halved(f):
    """With a reverse rule of its own, half the gradient, which calls the model's."""
    g = jax.custom_vjp(f)
    g.defvjp(
        lambda x, y: (f(x, y), (x, y)),
        lambda kept, ct: jax.tree.map(lambda d: 0.5 * ct * d, jax.grad(f, (0, 1))(*kept)),
    )
    return g


@pytest.mark.parametrize(
    "engine, name", cases(REVERSE, "value_and_grad under jit", "vjp of one output")
)
def test_reverse_mode_is_that_of_the_function_in_jax(engine, name):
    assert_transforms(REVERSE[name], engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_number_and_its_gradient_are_one_call(engine):
    f = wrapped(Number(), engine)
    x, y = random(3), random(3, seed=1)
    program = jax.jit(jax.value_and_grad(f, (0, 1)))
    text = program.lower(x, y).as_text()
    assert text.count("custom_call @torchcall") == 1, text
    assert_close(program(x, y), jax.value_and_grad(number_in_jax, (0, 1))(x, y))
    assert f.stats()["calls"] == 1


def test_only_what_is_differentiated_requires_grad():
    seen = []

    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((x.requires_grad, y.requires_grad))
        return x * y, Unused.apply(x)

    g = TorchModuleWrapper(f)
    x = random(3)
    seen.clear()  # of the trace
    got = jax.grad(lambda x: g(x, x)[0].sum() * 0 + g(x, random(3, seed=1))[0].sum())(x)
    np.testing.assert_allclose(got, random(3, seed=1))
    assert (True, False) in seen
    assert (False, True) not in seen


class Unused(torch.autograd.Function):
    """An output whose gradient must not be computed."""

    @staticmethod
    def forward(ctx, x):
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx, *grad_outputs):
        del ctx, grad_outputs
        raise RuntimeError("the gradient of an output that nothing uses")


@pytest.mark.parametrize("engine", ENGINES)
def test_integers_have_no_gradient(engine):
    f = wrapped(Mixed(), engine)
    arguments = random(3, 3), random(2, seed=1), ROWS
    for g in (f, mixed_in_jax):
        grad = jax.grad(lambda *a, g=g: g(*a)[0].sum(), argnums=(0, 2), allow_int=True)(*arguments)
        assert grad[1].dtype == jax.dtypes.float0
    assert_close(
        jax.jvp(lambda x: f(x, *arguments[1:]), (arguments[0],), (arguments[0],)),
        jax.jvp(lambda x: mixed_in_jax(x, *arguments[1:]), (arguments[0],), (arguments[0],)),
    )


def square_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    x.mul_(2)
    return x * y


def wide(x: Tensor) -> Tensor:
    assert x.dtype == torch.float64
    return (x * x * x).sum()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_that_writes_to_its_input_is_differentiated(engine):
    x = random(4)
    got = jax.grad(lambda x: wrapped(square_in_place, engine)(x).sum())(x)
    np.testing.assert_allclose(got, 4 * x, rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_have_the_dtype_of_the_operand_before_its_cast(engine):
    f = wrapped(wide, engine, input_spec=torch.float64)
    x = random(4).astype(jnp.float32)
    got = jax.grad(lambda x: f(x))(x)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, 3 * x**2, rtol=1e-6)
    assert jax.hessian(lambda x: f(x))(x).dtype == jnp.float32


def turned(z: Tensor, w: Tensor) -> Tensor:
    return z * z.conj() * w + torch.exp(w) * z


@pytest.mark.parametrize("engine", ENGINES)
def test_complex_gradients_follow_the_conventions_of_jax(engine):
    z, w = (jax.lax.complex(random(3, seed=k), random(3, seed=k + 1)) for k in (0, 2))
    i = jnp.asarray(1j)

    def in_jax(z, w):
        return z * jnp.conj(z) * w + jnp.exp(w) * z

    f = wrapped(turned, engine)
    for g in (
        lambda f: lambda *a: jax.grad(lambda *a: jnp.abs(f(*a)).sum(), (0, 1))(*a),
        lambda f: lambda *a: jax.jvp(f, a, (a[1], i * a[0])),
        lambda f: lambda *a: jax.vjp(f, *a)[1](a[0]),
        lambda f: (
            lambda *a: jax.grad(
                lambda *a: jnp.abs(jax.grad(lambda *a: jnp.abs(f(*a)).sum())(*a)).sum()
            )(*a)
        ),
    ):
        assert_close(g(f)(z, w), g(in_jax)(z, w))


@pytest.mark.parametrize("engine", ENGINES)
def test_an_output_that_does_not_depend_has_zero_gradient(engine):
    f = wrapped(constant_and_product, engine)
    x = random(3)
    assert_close(jax.jacrev(f)(x), (jnp.zeros((3, 3)), 2 * jnp.eye(3)))
    assert_close(jax.jacfwd(f)(x), (jnp.zeros((3, 3)), 2 * jnp.eye(3)))


def constant_and_product(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(x), 2 * x


class Detached(torch.nn.Module):
    """An energy of a copy of its input, and the gradient by that copy."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        copy = x.detach().requires_grad_(True)
        energy = (copy**2).sum()
        gradient = torch.autograd.grad([energy], [copy], create_graph=True)[0]
        assert gradient is not None
        return energy, gradient


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "module, parts",
    [(Detached(), ["operand args[0]", "detach"]), (Spring(), ["create_graph"])],
    ids=["detached", "without create_graph"],
)
def test_a_model_that_hides_its_gradient_is_an_error_and_not_zero(engine, module, parts):
    f = wrapped(module, engine, requires_grad=True)
    x = random(3).astype(jnp.float32)
    for output in (0, 1):
        text = error_of(lambda i=output: jax.grad(lambda x: f(x)[i].sum())(x))
        assert all(part in text for part in parts), text
    assert float(f(x)[0]) > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_are_neither_differentiated_nor_changed(engine):
    module = Mixed()
    f = wrapped(module, engine)
    jax.grad(lambda x: f(x, random(2), ROWS)[0].sum())(random(3, 3))
    assert module.weight.grad is None
    assert module.weight.requires_grad
    with torch.no_grad():
        module.weight.zero_()
    assert not jax.grad(lambda x: f(x, random(2), ROWS)[0].sum())(random(3, 3)).any()


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_differentiate_at_once(engine):
    f = wrapped(Mixed(), engine)
    g = jax.jit(jax.grad(lambda x: f(x, random(2, seed=1), ROWS)[0].sum()))
    xs = [random(3, 3, seed=seed) for seed in range(4)]
    expected = [
        jax.grad(lambda x: mixed_in_jax(x, random(2, seed=1), ROWS)[0].sum())(x) for x in xs
    ]
    got: dict[int, list] = {}

    def work(i):
        with jax.enable_x64(True):
            got[i] = [g(xs[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i, value in enumerate(expected):
        for one in got[i]:
            np.testing.assert_allclose(one, value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_plans_of_derivatives_go_with_the_wrapper(engine):
    jax.clear_caches()
    gc.collect()
    before = _bridge.live_plans()
    f = wrapped(Number(), engine)
    x, y = random(3), random(3, seed=1)
    jax.hessian(f)(x, y)
    assert _bridge.live_plans() > before
    del f
    jax.clear_caches()
    gc.collect()
    assert _bridge.live_plans() == before


def test_linear_transpose_is_refused():
    f = wrapped(square_in_place, "TorchScript")
    x = random(3)
    assert "linear_transpose" in error_of(lambda: jax.linear_transpose(f, x)(x))
