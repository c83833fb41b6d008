"""Models and checks for the GPU tests, and how they differ when run on the CPU."""

import os
import warnings

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

ON_CPU = os.environ.get("TORCHCALL_GPU_TESTS_ON_CPU") == "1"
needs_gpu = pytest.mark.skipif(ON_CPU, reason="meaningless on a CPU")
TORCH_DEVICE = "cpu" if ON_CPU else "cuda"
MODULES = {"TorchScript": torch.jit.script, "eager": lambda module: module}
both_engines = pytest.mark.parametrize("made_by", MODULES.values(), ids=MODULES)


class Polynomial(nn.Module):
    """`weight ∘ x² + x`, deterministic bit by bit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.5, -2.0, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * x + x


class Quartic(nn.Module):
    """Energy Σ x⁴ and its gradient, by autograd."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        energy = x.pow(4).sum()
        gradient = torch.autograd.grad([energy], [x])[0]
        assert gradient is not None
        return energy.detach(), gradient


def sleep(tensor: Tensor) -> None:
    """Delays the current stream, so that work on a wrong stream gives wrong results."""
    if tensor.is_cuda:
        torch.cuda._sleep(2_000_000)  # about a millisecond


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Normal random float32."""
    return np.random.default_rng(seed).normal(size=shape or (4, 3)).astype(np.float32)


def results(call, *inputs):
    """The call's results for each input, as NumPy arrays."""
    return [jax.tree.map(np.asarray, call(x)) for x in inputs]


def assert_replayed(wrapper, calls):
    """Asserts that of `calls` calls of one plan all but the first two were replays."""
    stats = wrapper.stats()
    assert stats["calls"] == calls
    assert stats["fallback"] is None
    if ON_CPU:
        assert stats["graph_captures"] == stats["graph_replays"] == 0
        return
    assert stats["graph_captures"] == 1
    assert stats["graph_replays"] >= calls - 2
    assert "cuda:0" in stats["devices"]


def falls_back(wrapper, run):
    """Runs `run()`, which makes three or more calls. Asserts a fallback with one warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    if ON_CPU:
        return result
    ours = [str(w.message) for w in caught if "torchcall" in str(w.message)]
    assert len(ours) == 1, ours
    stats = wrapper.stats()
    assert stats["fallback"], stats
    assert stats["graph_replays"] == 0, stats
    return result


def assert_healthy():
    """Asserts that JAX, torch and a new captured model work after an error."""
    import torchcall

    wrapper = torchcall.TorchModuleWrapper(Polynomial())
    for seed in range(4):
        x = numbers(seed)
        found = np.asarray(jax.jit(wrapper)(x))
        np.testing.assert_allclose(found, [1.5, -2.0, 0.25] * x * x + x, rtol=1e-5, atol=1e-6)
    assert_replayed(wrapper, 4)
    ones = torch.ones(5, device=TORCH_DEVICE)
    assert float((ones + ones).sum()) == 10.0
