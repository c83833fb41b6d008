"""Loops, branches and scans around calls, with derivatives and `vmap`, against JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor
from twins import ENGINES, assert_close, cases, random, wrapped

pytestmark = pytest.mark.usefixtures("x64")


def damped(x: Tensor) -> Tensor:
    """A contraction."""
    return 0.5 * torch.cos(x)


def product(x: Tensor, y: Tensor) -> Tensor:
    """Of rotations by angles, whose order does not matter for grouping: associative."""
    return x + y + 0.1 * (x * y)


def damped_in_jax(x):
    return 0.5 * jnp.cos(x)


def product_in_jax(x, y):
    return x + y + 0.1 * (x * y)


FUNCTIONS = {damped: damped_in_jax, product: product_in_jax}


def to_convergence(f):
    """The fixed point of f."""

    def step(state):
        x, _ = state
        new = f(x)
        return new, jnp.abs(new - x).max()

    return lambda x: jax.lax.while_loop(lambda state: state[1] > 1e-9, step, (x, jnp.inf))[0]


def branches(f):
    """One of three functions by an index that is part of the data."""

    def chosen(x):
        index = (jnp.abs(x).sum() * 10).astype(int) % 3
        return jax.lax.switch(index, [f, lambda x: f(2 * x), lambda x: x], x)

    return chosen


PROGRAMS = {
    "scan": (damped, lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), f(c) * 2), x, None, 4)),
    "while_loop to convergence": (damped, to_convergence),
    "vmap of a while_loop": (damped, lambda f: jax.vmap(to_convergence(f))),
    "jvp of a while_loop": (
        damped,
        lambda f: lambda x: jax.jvp(to_convergence(f), (x,), (jnp.ones_like(x),)),
    ),
    "fori_loop": (damped, lambda f: lambda x: jax.lax.fori_loop(0, 5, lambda _, x: f(x), x)),
    "grad of a fori_loop": (
        damped,
        lambda f: jax.grad(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: f(x), x).sum()),
    ),
    "cond": (damped, lambda f: lambda x: jax.lax.cond(x[0, 0] < 0, f, lambda x: x, x)),
    "grad of cond": (
        damped,
        lambda f: jax.grad(lambda x: jax.lax.cond(x[0, 0] < 9, f, jnp.sin, x).sum()),
    ),
    "switch": (damped, branches),
    "vmap of switch": (damped, lambda f: jax.vmap(branches(f))),
    "grad of vmap of switch": (
        damped,
        lambda f: jax.grad(lambda x: (jax.vmap(branches(f))(x) ** 2).sum()),
    ),
    "associative_scan": (product, lambda f: lambda x: jax.lax.associative_scan(f, x)),
    "grad of associative_scan": (
        product,
        lambda f: jax.grad(lambda x: jax.lax.associative_scan(f, x)[-1].sum()),
    ),
    "lax.map in batches": (damped, lambda f: lambda x: jax.lax.map(f, x, batch_size=2)),
}
QUICK = ("scan", "while_loop to convergence", "vmap of switch", "associative_scan")


@pytest.mark.parametrize("engine, name", cases(PROGRAMS, *QUICK))
def test_programs_are_those_of_the_function_in_jax(engine, name):
    function, program = PROGRAMS[name]
    x = random(5, 3)
    got = jax.jit(program(wrapped(function, engine)))(x)
    assert_close(got, jax.jit(program(FUNCTIONS[function]))(x))


@pytest.mark.parametrize("engine", ENGINES)
def test_branches_over_models_run_only_the_chosen_one(engine):
    first, second = wrapped(damped, engine), wrapped(damped, engine)

    @jax.jit
    def program(i, x):
        return jax.lax.switch(i, [first, lambda x: second(x) + 1, lambda x: x], x)

    x = random(2, 3)
    np.testing.assert_allclose(program(1, x), damped_in_jax(x) + 1, rtol=1e-12)
    assert (first.stats()["calls"], second.stats()["calls"]) == (0, 1)
    gradient = jax.jit(jax.grad(lambda i, x: program(i, x).sum(), 1))(0, x)
    np.testing.assert_allclose(gradient, -0.5 * jnp.sin(x), rtol=1e-12)
    assert second.stats()["calls"] == 1
