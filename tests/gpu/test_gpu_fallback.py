"""Models that a CUDA graph cannot hold run without one, say so once, and harm nobody."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gpu_models import (
    REHEARSAL,
    TORCH_DEVICE,
    Polynomial,
    assert_healthy,
    both_engines,
    falls_back,
    needs_gpu,
    numbers,
    results,
)
from models import error_of, like_input
from torch import Tensor, nn

import torchcall

pytestmark = pytest.mark.gpu
INPUTS = [numbers(seed) for seed in range(5)]


class AsksTheHost(nn.Module):
    """`x` times the number of its positive entries, which the host looks at."""

    def forward(self, x: Tensor) -> Tensor:
        return x * int((x > 0).sum().item())


class DataDependent(nn.Module):
    """`x` plus the sum of its positive entries, whose number depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x[x > 0].sum()


class CopiesFromTheHost(nn.Module):
    """Makes a tensor on the CPU and takes it over, pageable memory and all."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(3, dtype=torch.float32).to(x.device)


EXPECTED = {
    AsksTheHost: lambda x: x * (x > 0).sum(),
    DataDependent: lambda x: x + x[x > 0].sum(dtype=float),
}


@pytest.mark.parametrize("model", EXPECTED, ids=lambda model: model.__name__)
@both_engines
def test_a_model_that_asks_the_host_runs_uncaptured(made_by, model):
    wrapper = torchcall.TorchModuleWrapper(made_by(model()), output_spec=like_input)
    found = falls_back(wrapper, lambda: results(jax.jit(wrapper), *INPUTS))
    for x, y in zip(INPUTS, found, strict=True):
        np.testing.assert_allclose(y, EXPECTED[model](x), rtol=1e-5, atol=1e-5)
    assert wrapper.stats()["calls"] == len(INPUTS)
    assert_healthy()


@needs_gpu
@pytest.mark.parametrize("model", [AsksTheHost, DataDependent], ids=lambda model: model.__name__)
@both_engines
def test_require_says_why_it_cannot(made_by, model):
    wrapper = torchcall.TorchModuleWrapper(
        made_by(model()), output_spec=like_input, cuda_graph="require"
    )
    text = error_of(lambda: results(jax.jit(wrapper), *INPUTS))
    assert "cuda_graph='require'" in text
    assert model.__name__ in text
    assert_healthy()


@pytest.mark.filterwarnings("ignore:.*torchcall")
@both_engines
def test_what_a_capture_makes_of_host_memory_is_right_or_not_made(made_by):
    wrapper = torchcall.TorchModuleWrapper(made_by(CopiesFromTheHost()), output_spec=like_input)
    for x, y in zip(INPUTS, results(jax.jit(wrapper), *INPUTS), strict=True):
        np.testing.assert_allclose(y, x + np.arange(3), rtol=1e-6)
    assert_healthy()


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@both_engines
def test_a_model_that_draws_random_numbers_draws_new_ones(made_by):
    wrapper = torchcall.TorchModuleWrapper(made_by(Noise()), output_spec=like_input)
    zero = np.zeros((4, 3), np.float32)
    draws = falls_back(wrapper, lambda: results(jax.jit(wrapper), *[zero] * 6))
    assert len({draw.tobytes() for draw in draws}) == 6
    assert all(draw.min() >= 0 and draw.max() < 1 for draw in draws)


class OwnsAGraph(nn.Module):
    """`2 x`, replayed from a CUDA graph that the module captured itself."""

    def __init__(self) -> None:
        super().__init__()
        self.slot = torch.zeros(4, 3, device=TORCH_DEVICE)
        self.graph = None
        if not REHEARSAL:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.doubled = self.slot * 2

    def forward(self, x: Tensor) -> Tensor:
        if self.graph is None:
            return x * 2
        self.slot.copy_(x)
        self.graph.replay()
        return self.doubled.clone()

    def __deepcopy__(self, memo: dict[int, object]) -> "OwnsAGraph":
        return self  # a graph cannot be copied


@pytest.mark.filterwarnings("ignore:.*torchcall")
def test_a_module_that_owns_cuda_graphs_is_right():
    wrapper = torchcall.TorchModuleWrapper(OwnsAGraph(), output_spec=like_input)
    for x, y in zip(INPUTS, results(jax.jit(wrapper), *INPUTS), strict=True):
        np.testing.assert_array_equal(y, 2 * x)
    assert_healthy()


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*torchcall", "ignore:The AccumulateGrad node's stream")
def test_graphed_callables_of_torchs_own_are_right():
    sample = torch.zeros(4, 3, device=TORCH_DEVICE)
    module = torch.cuda.make_graphed_callables(Polynomial().to(TORCH_DEVICE), (sample,))
    wrapper = torchcall.TorchModuleWrapper(module, output_spec=like_input)
    for x, y in zip(INPUTS, results(jax.jit(wrapper), *INPUTS), strict=True):
        expected = np.array([1.5, -2.0, 0.25]) * x * x + x
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert_healthy()


def capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class RaisesHalfWay(nn.Module):
    """`2 x + 1`; while it is captured it raises after its first kernel."""

    def forward(self, x: Tensor) -> Tensor:
        twice = x * 2
        if capturing(x):
            raise RuntimeError("half-way")
        return twice + 1


class SpoilsTheCapture(nn.Module):
    """`2 x + 1`; while it is captured it does what a capture forbids."""

    def forward(self, x: Tensor) -> Tensor:
        twice = x * 2
        if capturing(x):
            torch.cuda.synchronize()
        return twice + 1


class LeavesAForkBehind(nn.Module):
    """`2 x + 1`; while it is captured, another stream joins the capture and never returns."""

    def forward(self, x: Tensor) -> Tensor:
        if capturing(x):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x + 1
        return x * 2 + 1


@pytest.mark.parametrize(
    "model", [RaisesHalfWay, SpoilsTheCapture, LeavesAForkBehind], ids=lambda model: model.__name__
)
def test_a_capture_that_fails_half_way_leaves_the_process_healthy(model):
    wrapper = torchcall.TorchModuleWrapper(model(), output_spec=like_input)
    found = falls_back(wrapper, lambda: results(jax.jit(wrapper), *INPUTS))
    for x, y in zip(INPUTS, found, strict=True):
        np.testing.assert_array_equal(y, 2 * x + 1)
    assert_healthy()


@pytest.mark.filterwarnings("error:torchcall")
def test_a_capture_that_another_thread_voids_is_made_by_a_later_call():
    waits = [True]

    def wait() -> None:
        with contextlib.suppress(RuntimeError):  # CUDA forbids it meanwhile, to this thread too
            torch.cuda.synchronize()

    def disturbed(x: Tensor) -> Tensor:
        twice = x * 2
        if capturing(x) and waits and waits.pop():
            thread = threading.Thread(target=wait)
            thread.start()
            thread.join()
        return twice + 1

    wrapper = torchcall.TorchModuleWrapper(disturbed, output_spec=like_input, cuda_graph="auto")
    for x, y in zip(INPUTS, results(jax.jit(wrapper), *INPUTS), strict=True):
        np.testing.assert_array_equal(y, 2 * x + 1)
    stats = wrapper.stats()
    assert stats["fallback"] is None
    assert stats["graph_captures"] == (0 if REHEARSAL else 1)
    assert_healthy()


def test_other_threads_run_jax_while_models_are_captured():
    stop, failures, rounds = threading.Event(), [], []
    matrix = jnp.full((40, 40), 0.025)

    def compute():
        product = jax.jit(lambda m: m @ m)
        try:
            while not stop.is_set():
                found = np.asarray(product(matrix + 0))
                np.testing.assert_allclose(found, 0.025, rtol=1e-2)
                # Allocates and frees: a capture of the whole process would refuse it.
                jnp.zeros(1 << 16).block_until_ready().delete()
                rounds.append(1)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        wrapper = torchcall.TorchModuleWrapper(torch.jit.script(Polynomial()))
        for rows in range(2, 12):
            x = numbers(rows, rows, 3)
            expected = np.array([1.5, -2.0, 0.25]) * x * x + x
            for found in results(jax.jit(wrapper), x, x, x):
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures
    assert rounds
    stats = wrapper.stats()
    assert stats["fallback"] is None
    assert stats["graph_captures"] == (0 if REHEARSAL else 10)
