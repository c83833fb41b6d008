"""Selects the device of the GPU tests: the first CUDA device, or the CPU for those that can."""

import os

import jax
import pytest
import torch
from gpu_models import ON_CPU


def _no_device():
    """Why torch or JAX has no CUDA device; empty if both have one."""
    if not torch.cuda.is_available():
        return f"no CUDA device: torch {torch.__version__} sees none"
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"no CUDA device: JAX {jax.__version__}: {str(error).splitlines()[0]}"
    return ""


@pytest.fixture(scope="session")
def device():
    """The JAX device of the tests."""
    if ON_CPU:
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
    """Checks after each test that both frameworks still work."""
    yield
    if device.platform != "cpu":
        assert float(torch.ones(3, device="cuda").sum()) == 3.0
    assert float(jax.device_put(2.0, device) + 1) == 3.0
