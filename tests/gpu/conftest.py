"""Where GPU tests run: the first CUDA device; in a rehearsal, those that can run on the CPU."""

import os

import jax
import pytest
import torch
from gpu_models import REHEARSAL


def _no_device():
    """Why there is no CUDA device for both frameworks; empty where there is one."""
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} sees none"
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"no CUDA device: JAX {jax.__version__}: {str(error).splitlines()[0]}"
    return ""


@pytest.fixture(scope="session")
def device():
    """The JAX device that tests run on."""
    if REHEARSAL:
        return jax.devices("cpu")[0]
    reason = _no_device()
    if reason and os.environ.get("TORCHCALL_REQUIRE_GPU") == "1":
        pytest.fail(f"TORCHCALL_REQUIRE_GPU=1: {reason}", pytrace=False)
    if reason:
        pytest.skip(reason)
    return jax.devices("cuda")[0]


@pytest.fixture(autouse=True)
def _on_device(device):
    with jax.default_device(device):
        yield


@pytest.fixture(autouse=True)
def _device_stays_usable(device):
    """After every test, both frameworks still compute."""
    yield
    if device.platform != "cpu":
        assert float(torch.ones(3, device="cuda").sum()) == 3.0
    assert float(jax.device_put(2.0, device) + 1) == 3.0
