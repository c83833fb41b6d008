"""Models that cannot be captured run without a CUDA graph, warn once and give right results."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gpu_models import (
    ON_CPU,
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


class ReadsOnTheHost(nn.Module):
    """`x` times the number of its positive entries, which the host reads."""

    def forward(self, x: Tensor) -> Tensor:
        return x * int((x > 0).sum().item())


class DataDependent(nn.Module):
    """`x` plus the sum of its positive entries, whose number depends on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x[x > 0].sum()


class CopiesFromTheHost(nn.Module):
    """Creates a tensor in pageable host memory and copies it to the device."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(3, dtype=torch.float32).to(x.device)


EXPECTED = {
    ReadsOnTheHost: lambda x: x * (x > 0).sum(),
    DataDependent: lambda x: x + x[x > 0].sum(dtype=float),
}


@pytest.mark.parametrize("model", EXPECTED, ids=lambda model: model.__name__)
@both_engines
def test_a_model_that_reads_values_on_the_host_runs_without_a_graph(made_by, model):
    wrapper = torchcall.TorchModuleWrapper(made_by(model()), output_spec=like_input)
    found = falls_back(wrapper, lambda: results(jax.jit(wrapper), *INPUTS))
    for x, y in zip(INPUTS, found, strict=True):
        np.testing.assert_allclose(y, EXPECTED[model](x), rtol=1e-5, atol=1e-5)
    assert wrapper.stats()["calls"] == len(INPUTS)
    assert_healthy()


@needs_gpu
@pytest.mark.parametrize("model", [ReadsOnTheHost, DataDependent], ids=lambda model: model.__name__)
@both_engines
def test_require_reports_why_the_capture_failed(made_by, model):
    wrapper = torchcall.TorchModuleWrapper(
        made_by(model()), output_spec=like_input, cuda_graph="require"
    )
    text = error_of(lambda: results(jax.jit(wrapper), *INPUTS))
    assert "cuda_graph='require'" in text
    assert model.__name__ in text
    assert_healthy()


@pytest.mark.filterwarnings("ignore:.*torchcall")
@both_engines
def test_a_model_that_copies_from_host_memory_gives_right_results(made_by):
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
    """`2 x`, by a CUDA graph that the module captured itself."""

    def __init__(self) -> None:
        super().__init__()
        self.slot = torch.zeros(4, 3, device=TORCH_DEVICE)
        self.graph = None
        if not ON_CPU:
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
def test_a_module_with_its_own_cuda_graph_gives_right_results():
    wrapper = torchcall.TorchModuleWrapper(OwnsAGraph(), output_spec=like_input)
    for x, y in zip(INPUTS, results(jax.jit(wrapper), *INPUTS), strict=True):
        np.testing.assert_array_equal(y, 2 * x)
    assert_healthy()


@needs_gpu
@pytest.mark.filterwarnings("ignore:.*torchcall", "ignore:The AccumulateGrad node's stream")
def test_torchs_graphed_callables_give_right_results():
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
    """`2 x + 1`; raises after its first kernel during a capture."""

    def forward(self, x: Tensor) -> Tensor:
        twice = x * 2
        if capturing(x):
            raise RuntimeError("half-way")
        return twice + 1


class Synchronises(nn.Module):
    """`2 x + 1`; synchronises during a capture, which is forbidden."""

    def forward(self, x: Tensor) -> Tensor:
        twice = x * 2
        if capturing(x):
            torch.cuda.synchronize()
        return twice + 1


class ForksWithoutJoining(nn.Module):
    """`2 x + 1`; forks a stream from the capture and does not join it."""

    def forward(self, x: Tensor) -> Tensor:
        if capturing(x):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x + 1
        return x * 2 + 1


@pytest.mark.parametrize(
    "model", [RaisesHalfWay, Synchronises, ForksWithoutJoining], ids=lambda model: model.__name__
)
def test_the_process_stays_usable_after_a_failed_capture(model):
    wrapper = torchcall.TorchModuleWrapper(model(), output_spec=like_input)
    found = falls_back(wrapper, lambda: results(jax.jit(wrapper), *INPUTS))
    for x, y in zip(INPUTS, found, strict=True):
        np.testing.assert_array_equal(y, 2 * x + 1)
    assert_healthy()


@pytest.mark.filterwarnings("error:torchcall")
def test_a_later_call_retries_a_capture_that_another_thread_invalidated():
    pending = [True]

    def synchronise() -> None:
        with contextlib.suppress(RuntimeError):  # CUDA's error 900 in this thread
            torch.cuda.synchronize()

    def disturbed(x: Tensor) -> Tensor:
        twice = x * 2
        if capturing(x) and pending and pending.pop():
            thread = threading.Thread(target=synchronise)
            thread.start()
            thread.join()
        return twice + 1

    wrapper = torchcall.TorchModuleWrapper(disturbed, output_spec=like_input, cuda_graph="auto")
    for x, y in zip(INPUTS, results(jax.jit(wrapper), *INPUTS), strict=True):
        np.testing.assert_array_equal(y, 2 * x + 1)
    stats = wrapper.stats()
    assert stats["fallback"] is None
    assert stats["graph_captures"] == (0 if ON_CPU else 1)
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
                # Allocates and frees, which a capture in global mode would forbid.
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
    assert stats["graph_captures"] == (0 if ON_CPU else 10)
