"""Forward mode: `jvp`, `linearize` and `jacfwd` of a call against those of the function in JAX."""

import jax
import numpy as np
import pytest
from twins import ENGINES, Number, assert_transforms, cases, floats, random, wrapped

pytestmark = pytest.mark.usefixtures("x64")

FORWARD = {
    "jvp": lambda f: lambda x, y: jax.jvp(floats(f), (x, y), (x + 1, 2 * y)),
    "jvp by one": lambda f: lambda x, y: jax.jvp(lambda x: floats(f)(x, y), (x,), (x + 1,)),
    "linearize": lambda f: lambda x, y: jax.linearize(floats(f), x, y)[1](x + 1, 2 * y),
    "jacfwd": lambda f: jax.jit(jax.jacfwd(floats(f), (0, 1))),
}


@pytest.mark.parametrize("engine, name", cases(FORWARD, "jvp"))
def test_forward_mode_is_that_of_the_function_in_jax(engine, name):
    assert_transforms(FORWARD[name], engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_number_and_its_tangent_are_one_call(engine):
    f = wrapped(Number(), engine)
    x, y = random(3), random(3, seed=1)
    program = jax.jit(lambda x, y: jax.jvp(f, (x, y), (y, x)))
    assert program.lower(x, y).as_text().count("custom_call @torchcall") == 1
    _, tangent = program(x, y)
    step = 1e-5
    ends = [f(x + sign * step * y, y + sign * step * x) for sign in (1, -1)]
    np.testing.assert_allclose(tangent, (ends[0] - ends[1]) / (2 * step), rtol=1e-8)
    assert f.stats()["calls"] == 3
