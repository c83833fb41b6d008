"""CUDA graphs: when calls are captured and replayed, and that replays equal the model."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gpu_models import (
    ON_CPU,
    TORCH_DEVICE,
    Polynomial,
    Quartic,
    assert_replayed,
    both_engines,
    needs_gpu,
    numbers,
    results,
)
from torch import Tensor, nn

import torchcall

pytestmark = pytest.mark.gpu


@both_engines
def test_replays_equal_the_uncaptured_model_bit_by_bit(made_by):
    inputs = [numbers(seed) for seed in range(8)]
    found = {}
    for cuda_graph in ("off", "auto"):
        wrapper = torchcall.TorchModuleWrapper(
            made_by(Quartic()), requires_grad=True, cuda_graph=cuda_graph
        )
        found[cuda_graph] = results(jax.jit(wrapper), *inputs)
        if cuda_graph == "auto":
            assert_replayed(wrapper, len(inputs))
        else:
            assert wrapper.stats()["graph_captures"] == 0
    for plain, replayed in zip(found["off"], found["auto"], strict=True):
        np.testing.assert_array_equal(replayed[1], plain[1])
        np.testing.assert_allclose(replayed[0], plain[0], rtol=1e-6)


@both_engines
def test_the_second_call_captures(made_by):
    wrapper = torchcall.TorchModuleWrapper(made_by(Polynomial()))
    call, counts = jax.jit(wrapper), []
    for seed in range(4):
        jax.block_until_ready(call(numbers(seed)))
        counts.append(wrapper.stats()["graph_captures"])
    assert counts == ([0, 0, 0, 0] if ON_CPU else [0, 1, 1, 1])


@both_engines
def test_a_loop_replays_with_the_inputs_of_each_iteration(made_by):
    wrapper = torchcall.TorchModuleWrapper(made_by(Polynomial()))

    @jax.jit
    def program(x):
        return jax.lax.scan(lambda x, _: (0.5 * wrapper(x), x), x, None, length=20)

    x = 0.5 * numbers(0)
    _, path = program(x)
    expected = x.astype(float)
    for found in np.asarray(path):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        expected = 0.5 * (np.array([1.5, -2.0, 0.25]) * expected**2 + expected)
    assert_replayed(wrapper, 20)


def test_each_shape_has_its_own_graph():
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(Polynomial()))
    for _ in range(3):
        for rows in (2, 5, 9):
            x = numbers(rows, rows, 3)
            expected = np.array([1.5, -2.0, 0.25]) * x * x + x
            np.testing.assert_allclose(jax.jit(wrapper)(x), expected, rtol=1e-5, atol=1e-6)
    assert wrapper.stats()["graph_captures"] == (0 if ON_CPU else 3)


def test_two_captured_models_in_one_program_do_not_mix():
    first = torchcall.TorchModuleWrapper(torch.jit.script(Polynomial()))
    second = torchcall.TorchModuleWrapper(Quartic(), requires_grad=True)

    @jax.jit
    def program(x):
        return jax.lax.fori_loop(0, 6, lambda _, x: x - 0.01 * second(0.1 * first(x))[1], x)

    x = expected = numbers(0)
    for _ in range(6):
        inner = 0.1 * (np.array([1.5, -2.0, 0.25]) * expected**2 + expected)
        expected = expected - 0.04 * inner**3
    np.testing.assert_allclose(program(x), expected, rtol=1e-4, atol=1e-5)
    assert_replayed(first, 6)
    assert_replayed(second, 6)


@both_engines
def test_replays_use_weights_changed_in_place(made_by):
    module = Polynomial().to(TORCH_DEVICE)
    wrapper = torchcall.TorchModuleWrapper(made_by(module))
    call, x = jax.jit(wrapper), numbers(0)
    results(call, x, x, x)
    with torch.no_grad():
        module.weight.fill_(7.0)
    if not ON_CPU:
        torch.cuda.synchronize()
    np.testing.assert_allclose(call(x), 7 * x * x + x, rtol=1e-5, atol=1e-6)
    assert_replayed(wrapper, 4)


class Counts(nn.Module):
    """Adds one to its buffer at each call and returns `x + count`."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), device=TORCH_DEVICE))

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


@both_engines
def test_a_models_counter_advances_once_per_call(made_by):
    """Although warm-up and capture run the model additional times."""
    wrapper = torchcall.TorchModuleWrapper(made_by(Counts()))
    call = jax.jit(wrapper)
    found = [float(call(jnp.zeros(()) + k * 10)) - k * 10 for k in range(5)]
    assert found == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_require_captures():
    wrapper = torchcall.TorchModuleWrapper(
        torch.jit.script(Polynomial()), cuda_graph="auto" if ON_CPU else "require"
    )
    for seed in range(4):
        x = numbers(seed)
        expected = np.array([1.5, -2.0, 0.25]) * x * x + x
        np.testing.assert_allclose(jax.jit(wrapper)(x), expected, rtol=1e-5, atol=1e-6)
    assert wrapper.stats()["graph_captures"] == (0 if ON_CPU else 1)


@needs_gpu
@both_engines
def test_graph_memory_is_freed_with_the_wrapper(made_by, live_plans):
    def memory():
        jax.clear_caches()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    def round_trip():
        wrapper = torchcall.TorchModuleWrapper(made_by(Quartic()), requires_grad=True)
        call = jax.jit(wrapper)
        for _ in range(4):
            jax.block_until_ready(call(jnp.ones((1 << 18, 3))))
        assert_replayed(wrapper, 4)

    round_trip()  # torch creates its permanent handles and workspaces
    before, plans = memory(), live_plans()
    for _ in range(5):
        round_trip()
    after = memory()
    assert live_plans() == plans
    assert after[0] <= before[0]
    assert after[1] <= before[1] + (1 << 21)


@needs_gpu
def test_a_wrapper_dropped_during_its_replay():
    def slowly(x: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)
        return x + 1

    wrapper = torchcall.TorchModuleWrapper(slowly, output_spec=lambda x: x)
    call = jax.jit(wrapper)
    results(call, numbers(0), numbers(1), numbers(2))
    late = call(numbers(3))
    del call, wrapper
    jax.clear_caches()
    gc.collect()
    np.testing.assert_array_equal(late, numbers(3) + 1)
