"""Calls that return the results of an equal call before them, in one execution of a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torchcall
from torchcall._call.call import CallOptions

PAIR = jax.ShapeDtypeStruct((2,), jnp.float32)
PLAIN, REUSE = (CallOptions((PAIR, PAIR), reuses_last=reuse) for reuse in (False, True))
ONES = np.ones(2, np.float32)


class Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert n.min() >= 0, "negative"
        return self.factor * x, x.sum() + n


@pytest.fixture(params=["TorchScript", "eager"])
def wrapper(request):
    module = Scale()
    return torchcall.TorchModuleWrapper(
        torch.jit.script(module) if request.param == "TorchScript" else module
    )


def counts(wrapper):
    stats = wrapper.stats()
    return stats["calls"], stats["reused"]


def loop(wrapper, options):
    def body(k, carry):
        x, total = carry
        out, more = wrapper._call((x + (k // 2).astype(x.dtype), ONES), {}, options)
        return x, total + out.sum() + more.sum()

    return jax.jit(lambda x: jax.lax.fori_loop(0, 6, body, (x, jnp.float32(0)))[1])


def test_equal_calls_of_a_loop_run_the_model_once(wrapper):
    x = jnp.arange(2.0)
    expected = jax.block_until_ready(loop(wrapper, PLAIN)(x))
    assert counts(wrapper) == (6, 0)
    found = loop(wrapper, REUSE)(x)
    np.testing.assert_array_equal(found, expected)
    assert counts(wrapper) == (9, 3)


def test_another_execution_runs_the_model_with_its_present_weights():
    module = Scale()
    wrapper = torchcall.TorchModuleWrapper(module)
    run = jax.jit(lambda x: wrapper._call((x, ONES), {}, REUSE)[0])
    x = jnp.ones(2)
    assert run(x)[0] == 2
    with torch.no_grad():
        module.factor.fill_(3.0)
    assert run(x)[0] == 3
    assert wrapper._call((x, ONES), {}, REUSE)[0][0] == 3
    assert counts(wrapper) == (3, 0)


def test_operands_are_compared_bit_by_bit(wrapper):
    def body(k, _):
        value = jnp.where(k < 2, jnp.where(k == 1, -0.0, 0.0), jnp.nan)
        return wrapper._call((value * ONES, ONES), {}, REUSE)[0]

    run = jax.jit(lambda: jax.lax.fori_loop(0, 4, body, jnp.zeros(2)))
    assert np.isnan(run()).all()
    assert counts(wrapper) == (3, 1)


def test_a_failed_call_is_not_remembered(wrapper):
    def body(k, _):
        return wrapper._call((ONES, jnp.where(k < 2, 1.0, -1.0) * ONES), {}, REUSE)[0]

    run = jax.jit(lambda last: jax.lax.fori_loop(0, last, body, jnp.zeros(2)))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="negative"):
        jax.block_until_ready(run(4))
    assert counts(wrapper) == (2, 1)
    np.testing.assert_array_equal(run(2), 2 * ONES)
    assert counts(wrapper) == (3, 2)
