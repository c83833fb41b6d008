"""Helpers of the GPU tests: what differs in a rehearsal, models, and counts of graphs."""

import os
import warnings

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

REHEARSAL = os.environ.get("TORCHCALL_GPU_REHEARSAL") == "1"
# On devices that tests/standin/cuda plays, results are real and nothing is fast.
PLAYED = "TORCHCALL_STANDIN_OPERATORS" in os.environ
needs_gpu = pytest.mark.skipif(REHEARSAL, reason="says nothing without a GPU")
TORCH_DEVICE = "cpu" if REHEARSAL else "cuda"
MODULES = {"TorchScript": torch.jit.script, "eager": lambda module: module}
both_engines = pytest.mark.parametrize("made_by", MODULES.values(), ids=MODULES)


class Polynomial(nn.Module):
    """`weight ∘ x² + x`: the same bits whenever it is computed."""

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
    """Keeps the current stream busy, so that work on a wrong one is seen to be too early."""
    if tensor.is_cuda:
        torch.cuda._sleep(2_000_000)  # about a millisecond


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Normal random float32."""
    return np.random.default_rng(seed).normal(size=shape or (4, 3)).astype(np.float32)


def results(call, *inputs):
    """The call's results for each input in turn, as NumPy."""
    return [jax.tree.map(np.asarray, call(x)) for x in inputs]


def assert_replayed(wrapper, calls):
    """That after so many calls of one plan all but the first two were replays."""
    stats = wrapper.stats()
    assert stats["calls"] == calls
    assert stats["fallback"] is None
    if REHEARSAL:
        assert stats["graph_captures"] == stats["graph_replays"] == 0
        return
    assert stats["graph_captures"] == 1
    assert stats["graph_replays"] >= calls - 2
    assert "cuda:0" in stats["devices"]


def falls_back(wrapper, run):
    """`run()`, which calls the wrapper at least three times and must fall back, warning once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = run()
    if REHEARSAL:
        return result
    ours = [str(w.message) for w in caught if "torchcall" in str(w.message)]
    assert len(ours) == 1, ours
    stats = wrapper.stats()
    assert stats["fallback"], stats
    assert stats["graph_replays"] == 0, stats
    return result


def assert_healthy():
    """That JAX, torch and a new captured model work, whatever went wrong before."""
    import torchcall

    wrapper = torchcall.TorchModuleWrapper(Polynomial())
    for seed in range(4):
        x = numbers(seed)
        found = np.asarray(jax.jit(wrapper)(x))
        np.testing.assert_allclose(found, [1.5, -2.0, 0.25] * x * x + x, rtol=1e-5, atol=1e-6)
    assert_replayed(wrapper, 4)
    ones = torch.ones(5, device=TORCH_DEVICE)
    assert float((ones + ones).sum()) == 10.0
