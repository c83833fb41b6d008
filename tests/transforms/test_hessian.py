"""Second and third derivatives of a call against those of the function in JAX."""

import jax
import pytest
from jax.test_util import check_grads
from twins import ENGINES, Number, assert_transforms, cases, random, total, wrapped

pytestmark = pytest.mark.usefixtures("x64")

HIGHER = {
    "hessian": lambda f: jax.jit(jax.hessian(total(f), (0, 1))),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(total(f), (0, 1)), (0, 1)),
    "forward over forward": lambda f: jax.jacfwd(jax.jacfwd(total(f), (0, 1)), (0, 1)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(total(f), (0, 1)), (0, 1)),
    "third derivative": lambda f: jax.grad(
        lambda x, y: jax.grad(lambda x: jax.grad(total(f))(x, y)[0, 0])(x)[1, 1]
    ),
}


@pytest.mark.parametrize(
    "engine, name",
    cases(
        HIGHER,
        "hessian",
        slow=("forward over forward", "reverse over forward", "third derivative"),
    ),
)
def test_higher_derivatives_are_those_of_the_function_in_jax(engine, name):
    assert_transforms(HIGHER[name], engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_agree_with_finite_differences_to_second_order(engine):
    f = wrapped(Number(), engine)
    check_grads(f, (random(3), random(3, seed=1)), order=2)
