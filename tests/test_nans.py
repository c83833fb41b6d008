"""NaNs that a model returns: jax_debug_nans finds them, checkify needs a check of the result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental import checkify
from models import assert_same
from torch import Tensor

from torchcall import TorchModuleWrapper


def divides(x: Tensor) -> Tensor:
    return x / (x - 1)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eagerly", "under jit"])
def test_debug_nans_finds_a_nan_that_the_model_returns(wrap):
    f = wrap(TorchModuleWrapper(torch.jit.script(divides)))
    nan = np.array([np.nan], np.float32)
    with jax.debug_nans(True):
        assert_same(f(np.array([3.0], np.float32)), np.array([1.5], np.float32))
        with pytest.raises(FloatingPointError, match=r"nan.*torchcall: divides"):
            jax.block_until_ready(f(nan))


def test_checkify_needs_a_check_of_the_result():
    f = TorchModuleWrapper(torch.jit.script(divides))

    def checked(x):
        y = f(x)
        checkify.check(jnp.isfinite(y).all(), "the model returned a NaN")
        return y

    error, _ = checkify.checkify(jax.jit(checked))(np.array([np.nan], np.float32))
    assert "the model returned a NaN" in error.get()
