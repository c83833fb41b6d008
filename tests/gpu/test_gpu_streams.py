"""Streams and threads: autograd's, XLA's and the model's own are synchronised correctly."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gpu_models import (
    Polynomial,
    Quartic,
    assert_healthy,
    assert_replayed,
    both_engines,
    needs_gpu,
    numbers,
    results,
    sleep,
)
from models import like_input
from torch import Tensor, nn

import torchcall

pytestmark = pytest.mark.gpu
MODES = ("off", "auto")
WEIGHT = np.array([1.5, -2.0, 0.25])


class SlowCube(torch.autograd.Function):
    """x³ with a delayed backward pass: on a wrong stream its result comes too late."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (x,) = ctx.saved_tensors
        sleep(x)
        return grad_outputs[0] * 3 * x * x


class LateGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        sleep(x)
        energy = SlowCube.apply(x).sum()  # pyright: ignore[reportOptionalMemberAccess]
        return torch.autograd.grad(energy, x)[0]


@pytest.mark.parametrize("cuda_graph", MODES)
def test_backward_passes_run_on_xlas_stream(cuda_graph):
    """torch runs them on its own threads, on the stream of the forward operation."""
    wrapper = torchcall.TorchModuleWrapper(
        LateGradient(), requires_grad=True, output_spec=like_input, cuda_graph=cuda_graph
    )
    after = jax.jit(lambda x: wrapper(x) + 1)
    for seed in range(6):
        x = numbers(seed)
        np.testing.assert_allclose(after(x), 3 * x * x + 1, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cuda_graph", MODES)
def test_successive_gradients_of_a_scripted_model_are_ordered(cuda_graph):
    wrapper = torchcall.TorchModuleWrapper(
        torch.jit.script(Quartic()), requires_grad=True, cuda_graph=cuda_graph
    )
    x = numbers(0, 4096, 3)
    descend = jax.jit(lambda x: jax.lax.fori_loop(0, 30, lambda _, x: x - 0.01 * wrapper(x)[1], x))
    expected = x.astype(float)
    for _ in range(30):
        expected = expected - 0.04 * expected**3
    np.testing.assert_allclose(descend(x), expected, rtol=1e-4, atol=1e-5)


class SideStream(nn.Module):
    """`2 x + 1`, partly on a side stream that is joined as torch documents."""

    def __init__(self) -> None:
        super().__init__()
        self.side = torch.cuda.Stream() if torch.cuda.is_available() else None

    def forward(self, x: Tensor) -> Tensor:
        if self.side is None:
            return x * 2 + 1
        main = torch.cuda.current_stream()
        self.side.wait_stream(main)
        with torch.cuda.stream(self.side):
            sleep(x)
            twice = x * 2
        main.wait_stream(self.side)
        twice.record_stream(main)
        return twice + 1

    def __deepcopy__(self, memo: dict[int, object]) -> "SideStream":
        return SideStream()


@pytest.mark.parametrize("cuda_graph", MODES)
def test_a_module_with_a_side_stream(cuda_graph):
    wrapper = torchcall.TorchModuleWrapper(
        SideStream(), output_spec=like_input, cuda_graph=cuda_graph
    )
    call = jax.jit(lambda x: wrapper(x + 1) * 3)
    for seed in range(6):
        x = numbers(seed)
        np.testing.assert_allclose(call(x), 3 * (2 * (x + 1) + 1), rtol=1e-5, atol=1e-5)
    if cuda_graph == "auto":
        assert_replayed(wrapper, 6)


def on_stream(number: int, function: Any) -> Any:
    """The function on another XLA stream. Skips if this JAX has no such API."""
    from jax.experimental import compute_on as module

    kind = f"gpu_stream:{number}"
    memory = getattr(getattr(jax, "memory", None), "Space", None)
    two = getattr(module, "compute_on2", None)
    make = two or module.compute_on
    try:
        return make(compute_type=kind, out_memory_spaces=memory.Device)(jax.jit(function))  # pyright: ignore[reportOptionalMemberAccess]
    except (TypeError, AttributeError) as error:
        pytest.skip(f"no known API for streams in this JAX: {error}")


@needs_gpu
@pytest.mark.parametrize("cuda_graph", MODES)
def test_one_plan_on_several_xla_streams(cuda_graph):
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(Polynomial()), cuda_graph=cuda_graph)

    @jax.jit
    def program(x, y):
        first = on_stream(1, lambda x: wrapper(x) * 1.0)(x)
        second = on_stream(2, lambda y: wrapper(y) * 1.0)(y)
        return first + second, wrapper(x - y)

    for seed in range(8):
        x, y = numbers(seed), numbers(seed + 100)
        try:
            total, difference = program(x, y)
        except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, NotImplementedError) or "ExecutionStreamId" in str(error):
                pytest.skip(f"not supported by this JAX: {str(error)[:80]}")
            raise
        value = lambda x: WEIGHT * x * x + x  # noqa: E731
        np.testing.assert_allclose(total, value(x) + value(y), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(difference, value(x - y), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuda_graph", MODES)
@both_engines
def test_concurrent_calls_of_one_wrapper(made_by, cuda_graph, device):
    wrapper = torchcall.TorchModuleWrapper(made_by(Polynomial()), cuda_graph=cuda_graph)
    call = jax.jit(lambda x: jax.lax.fori_loop(0, 5, lambda _, x: 0.5 * wrapper(x), x))

    def work(seed: int) -> None:
        with jax.default_device(device):  # thread-local
            for k in range(6):
                x = 0.5 * numbers(10 * seed + k)
                expected = x.astype(float)
                for _ in range(5):
                    expected = 0.5 * (WEIGHT * expected * expected + expected)
                np.testing.assert_allclose(call(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert wrapper.stats()["calls"] == 4 * 6 * 5
    assert wrapper.stats()["fallback"] is None


def test_concurrent_captures_of_different_models(device):
    wrappers = [torchcall.TorchModuleWrapper(Polynomial()) for _ in range(4)]

    def work(wrapper: Any) -> None:
        with jax.default_device(device):
            for seed in range(5):
                x = numbers(seed)
                found = jax.jit(wrapper)(jnp.asarray(x))
                np.testing.assert_allclose(found, WEIGHT * x * x + x, rtol=1e-5, atol=1e-6)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, wrappers))
    for wrapper in wrappers:
        assert_replayed(wrapper, 5)


@needs_gpu
def test_calls_do_not_disturb_torchs_own_work():
    """torch's current stream and grad mode are unchanged, and its results are right."""
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(Polynomial()))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        mine = torch.ones(1000, device="cuda")
        for seed in range(4):
            results(jax.jit(wrapper), numbers(seed))
            mine = mine * 2
            assert torch.cuda.current_stream() == side
            assert not torch.is_grad_enabled()
    side.synchronize()
    assert float(mine.sum()) == 16_000.0
    assert_healthy()
