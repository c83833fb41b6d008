"""Rematerialisation of calls: the values, and how often the model runs."""

import jax
import jax.numpy as jnp
import pytest
from twins import ENGINES, Number, assert_close, assert_transforms, cases, random, total, wrapped

pytestmark = pytest.mark.usefixtures("x64")

REMAT = {
    "plain": lambda f: jax.grad(jax.checkpoint(total(f)), (0, 1)),
    "nothing is saved": lambda f: jax.grad(
        jax.checkpoint(total(f), policy=jax.checkpoint_policies.nothing_saveable), (0, 1)
    ),
    "everything is saved": lambda f: jax.jit(
        jax.grad(
            jax.checkpoint(total(f), policy=jax.checkpoint_policies.everything_saveable), (0, 1)
        )
    ),
    "in scan": lambda f: jax.grad(
        lambda x, y: jax.lax.scan(
            jax.checkpoint(lambda x, _: (jnp.tanh(total(f)(x, y)) * x, None)), x, None, 3
        )[0].sum()
    ),
    "of a hessian": lambda f: jax.hessian(jax.checkpoint(total(f))),
}


@pytest.mark.parametrize("engine, name", cases(REMAT, "plain", slow=("of a hessian",)))
def test_remat_is_that_of_the_function_in_jax(engine, name):
    assert_transforms(REMAT[name], engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_policy_decides_whether_the_model_runs_again(engine):
    f = wrapped(Number(), engine)
    x, y = random(3), random(3, seed=1)

    def loss(x, y):
        return jnp.sin(f(x, y))

    def calls(policy):
        program = jax.jit(jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1)))
        assert_close(program(x, y), jax.value_and_grad(loss, (0, 1))(x, y))
        return program.lower(x, y).as_text().count("custom_call @torchcall")

    assert calls(jax.checkpoint_policies.everything_saveable) == 1
    assert calls(jax.checkpoint_policies.nothing_saveable) == 2
