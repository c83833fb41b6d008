"""JAX's tools for programs, on calls: shapes, jaxprs, debugging, donation, disabled jit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from torch import Tensor
from twins import ENGINES, Number, assert_close, number_in_jax, random, wrapped

pytestmark = pytest.mark.usefixtures("x64")


def root(x: Tensor) -> Tensor:
    """Has an infinite gradient at zero."""
    return x.sqrt().sum()


@pytest.mark.parametrize("engine", ENGINES)
def test_shapes_are_known_without_a_call(engine):
    f = wrapped(Number(), engine)
    x = jax.ShapeDtypeStruct((3,), jnp.float64)
    assert jax.eval_shape(f, x, x) == jax.ShapeDtypeStruct((), jnp.float64)
    got = jax.eval_shape(jax.vmap(jax.grad(f)), *[jax.ShapeDtypeStruct((4, 3), jnp.float64)] * 2)
    assert got == jax.ShapeDtypeStruct((4, 3), jnp.float64)
    assert f.stats()["calls"] == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_jaxpr_names_the_model_the_derivative_and_the_mapped_axis(engine):
    f = wrapped(Number(), engine)
    x = random(4, 3)
    plain = str(jax.make_jaxpr(f)(x[0], x[0]))
    assert "torchcall[plan=CallPlan(Number)]" in plain.replace("\n", "").replace("  ", "")
    mapped = str(jax.make_jaxpr(jax.vmap(jax.grad(f)))(x, x))
    assert "CallPlan(Number, derivative of order 1, 4 calls)" in mapped


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_with_jit_disabled(engine):
    f, x = wrapped(Number(), engine), random(3)
    with jax.disable_jit():
        got = jax.value_and_grad(lambda x: jax.jit(f)(x, x))(x)
        mapped = jax.vmap(f)(x[None], x[None])
    assert_close(got, jax.value_and_grad(lambda x: number_in_jax(x, x))(x))
    assert_close(mapped, number_in_jax(x, x)[None])


@pytest.mark.parametrize("engine", ENGINES)
def test_debug_nans_finds_a_gradient_that_is_infinite_or_nan(engine):
    f = wrapped(root, engine)
    gradient = jax.jit(jax.grad(f))
    with jax.debug_nans(True), jax.debug_infs(True):
        assert_close(gradient(jnp.ones(2)), 0.5 * jnp.ones(2))
        with pytest.raises(FloatingPointError, match="inf"):
            jax.block_until_ready(gradient(jnp.zeros(2)))


@pytest.mark.parametrize("engine", ENGINES)
def test_checkify_checks_what_the_program_checks(engine):
    f = wrapped(root, engine)

    def checked(x):
        gradient = jax.grad(f)(x)
        checkify.check(jnp.isfinite(gradient).all(), "a gradient is not finite")
        return gradient

    run = checkify.checkify(jax.jit(checked))
    assert run(jnp.ones(2))[0].get() is None
    assert "a gradient is not finite" in str(run(jnp.zeros(2))[0].get())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_donated_operand_of_a_gradient(engine):
    f = wrapped(Number(), engine)
    program = jax.jit(jax.grad(f), donate_argnums=0)
    x, y = random(3), random(3, seed=1)
    expected = jax.grad(number_in_jax)(x, y)
    for _ in range(3):
        given = jnp.array(x, copy=True)
        assert_close(program(given, y), expected)
        assert given.is_deleted()


@pytest.mark.parametrize("engine", ENGINES)
def test_vectorize_maps_leading_axes(engine):
    f = jnp.vectorize(wrapped(Number(), engine), signature="(i),(i)->()")
    in_jax = jnp.vectorize(number_in_jax, signature="(i),(i)->()")
    x, y = random(2, 1, 3), random(4, 3, seed=1)
    assert_close(f(x, y), in_jax(x, y))
    np.testing.assert_allclose(f(x, y), in_jax(x, y))
