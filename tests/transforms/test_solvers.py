"""Implicit functions of JAX around calls: roots, linear systems and optimisers."""

import jax
import jax.numpy as jnp
import jax.scipy.optimize
import jax.scipy.sparse.linalg
import numpy as np
import pytest
from torch import Tensor
from twins import ENGINES, random, wrapped

pytestmark = pytest.mark.usefixtures("x64")


def residual(x: Tensor, a: Tensor) -> Tensor:
    """Zero where x + x³ = a."""
    return x + x.pow(3) - a


def times(x: Tensor, d: Tensor) -> Tensor:
    """A symmetric, positive definite matrix times x."""
    return (1 + d * d) * x + 0.1 * x.sum()


@pytest.mark.parametrize("engine", ENGINES)
def test_the_derivative_of_a_root_is_that_of_the_implicit_function(engine):
    f = wrapped(residual, engine)

    def root(a):
        def solve(g, x):
            def newton(_, x):
                return x - g(x) / jnp.diagonal(jax.jacfwd(g)(x))

            return jax.lax.fori_loop(0, 12, newton, x)

        def tangent_solve(g, y):
            return y / g(jnp.ones_like(y))  # g is linear and diagonal

        return jax.lax.custom_root(lambda x: f(x, a), jnp.zeros_like(a), solve, tangent_solve)

    a = random(3)
    x = jax.jit(root)(a)
    np.testing.assert_allclose(x + x**3, a, rtol=1e-12)
    expected = np.diag(1 / (1 + 3 * np.asarray(x) ** 2))
    np.testing.assert_allclose(jax.jit(jax.jacrev(root))(a), expected, atol=1e-12)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(root))(a), expected, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_linear_system_whose_matrix_is_a_model(engine):
    """Conjugate gradients call the model; reverse mode solves with the transposed call."""
    f = wrapped(times, engine)
    d = random(4)

    def solution(b, d):
        # Of a linear function: its derivative is itself, and has a transpose.
        def matvec(x):
            return jax.jvp(lambda x: f(x, d), (jnp.zeros_like(x),), (x,))[1]

        return jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-14)[0]

    def in_jax(b, d):
        return jnp.linalg.solve(jnp.diag(1 + d * d) + 0.1, b)

    b = random(4, seed=1)
    np.testing.assert_allclose(jax.jit(solution)(b, d), in_jax(b, d), rtol=1e-10)
    for argument in (0, 1):
        got = jax.jit(jax.jacrev(solution, argument))(b, d)
        np.testing.assert_allclose(got, jax.jacrev(in_jax, argument)(b, d), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_minimiser_of_jax_takes_the_steps_of_the_function_in_jax(engine):
    a = random(3)

    def found(f):
        def norm(x):
            return (f(x, a) ** 2).sum()

        return jax.scipy.optimize.minimize(norm, jnp.zeros(3), method="BFGS").x

    expected = found(lambda x, a: x + x**3 - a)
    np.testing.assert_allclose(found(wrapped(residual, engine)), expected, rtol=1e-8)
