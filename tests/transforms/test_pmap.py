"""`pmap` of a call, and of its derivative."""

import eight
import pytest

PROGRAM = """
    f = wrapped(Both(), ENGINE)
    pairs = x.reshape(8, 2, 3)
    same("pmap", jax.pmap(f, in_axes=(0, None))(pairs, y), in_jax(pairs, y))
    same(
        "of grad",
        jax.pmap(jax.grad(square(f), BOTH), in_axes=(0, None))(pairs, y),
        jax.vmap(jax.grad(square(in_jax), BOTH), (0, None))(pairs, y),
    )
    total = jax.pmap(lambda x, y: jax.lax.psum(f(x, y)[0], "d"), "d", in_axes=(0, None))
    same("psum", total(pairs, y), jnp.broadcast_to(in_jax(pairs, y)[0].sum(0), (8, 2)))
"""


@pytest.mark.parametrize("engine", eight.ENGINES)
def test_pmap_of_a_call(tmp_path, engine):
    eight.run(tmp_path, engine, PROGRAM)
