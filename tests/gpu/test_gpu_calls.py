"""Calls on a GPU: results, dtypes, pytrees, weights, inputs written in place or retained."""

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
    both_engines,
    needs_gpu,
    numbers,
)
from models import Linear, like_input
from torch import Tensor, nn

import torchcall

pytestmark = pytest.mark.gpu
MODES = ("off", "auto")


@pytest.mark.parametrize("cuda_graph", MODES)
@both_engines
def test_results_equal_torch(made_by, cuda_graph):
    module = Linear(3)
    wrapper = torchcall.TorchModuleWrapper(made_by(module), cuda_graph=cuda_graph)
    call = jax.jit(wrapper)
    for seed in range(4):
        x = numbers(seed, 5, 3)
        expected = module(torch.from_numpy(x)).detach().numpy()
        np.testing.assert_allclose(call(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuda_graph", MODES)
@both_engines
def test_a_model_that_differentiates_internally(made_by, cuda_graph):
    wrapper = torchcall.TorchModuleWrapper(
        made_by(Quartic()), requires_grad=True, cuda_graph=cuda_graph
    )
    for seed in range(4):
        x = numbers(seed)
        energy, gradient = jax.jit(wrapper)(x)
        np.testing.assert_allclose(energy, (x.astype(float) ** 4).sum(), rtol=1e-5)
        np.testing.assert_allclose(gradient, 4 * x**3, rtol=1e-5, atol=1e-6)


DTYPES = ("bool", "uint8", "int8", "int16", "int32", "float16", "bfloat16", "float32", "complex64")
WIDE = ("int64", "float64", "complex128")


def clone(x: Tensor) -> Tensor:
    return x.clone()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_preserved(dtype):
    x = jnp.asarray(numbers(0) * 3).astype(dtype)
    found = jax.jit(torchcall.TorchModuleWrapper(torch.jit.script(clone)))(x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(found), np.asarray(x))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", WIDE)
def test_every_64_bit_dtype_is_preserved(dtype):
    x = jnp.asarray(numbers(0) * 3).astype(dtype)
    found = jax.jit(torchcall.TorchModuleWrapper(torch.jit.script(clone)))(x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(found), np.asarray(x))


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 1, 3)], ids=str)
def test_scalars_and_axes_of_length_zero_and_one(shape):
    x = jnp.ones(shape, jnp.float32)
    found = jax.jit(torchcall.TorchModuleWrapper(torch.jit.script(clone)))(x)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(x))


class Gather(nn.Module):
    def forward(self, graph: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
        return {"picked": graph["pos"].index_select(0, graph["index"]) * factor}


@pytest.mark.parametrize("cuda_graph", MODES)
@both_engines
def test_dicts_scalars_and_casts(made_by, cuda_graph):
    wrapper = torchcall.TorchModuleWrapper(
        made_by(Gather()),
        input_spec=(({"pos": None, "index": torch.int64}, None), {}),
        cuda_graph=cuda_graph,
    )
    call = jax.jit(lambda pos, index: wrapper({"pos": pos, "index": index}, 2.0))
    for seed in range(4):
        pos = numbers(seed, 6, 3)
        index = np.random.default_rng(seed).integers(0, 6, 9).astype(np.int32)
        np.testing.assert_array_equal(call(pos, index)["picked"], pos[index] * 2)


@both_engines
def test_the_callers_module_is_not_moved(made_by):
    module = Linear(3)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    wrapper = torchcall.TorchModuleWrapper(made_by(module))
    for _ in range(3):
        jax.block_until_ready(wrapper(numbers(0, 5, 3)))
    for key, value in module.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[key])
    assert wrapper.stats()["devices"][-1] == ("cpu" if ON_CPU else "cuda:0")


@pytest.mark.parametrize("cuda_graph", MODES)
def test_one_wrapper_runs_on_cpu_and_gpu(cuda_graph):
    module = Linear(3)
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(module), cuda_graph=cuda_graph)
    x = numbers(0, 5, 3)
    expected = module(torch.from_numpy(x)).detach().numpy()
    for _ in range(3):
        here = jax.jit(wrapper)(x)
        with jax.default_device(jax.devices("cpu")[0]):
            there = jax.jit(wrapper)(x)
        np.testing.assert_allclose(here, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(there, expected, rtol=1e-6, atol=1e-6)
    assert "cpu" in wrapper.stats()["devices"]


@both_engines
def test_weights_of_a_module_on_the_device_are_shared(made_by):
    module = Polynomial().to(TORCH_DEVICE)
    wrapper = torchcall.TorchModuleWrapper(made_by(module))
    x = numbers(0)
    for factor in (1.0, 3.0, -2.0, 0.5):
        with torch.no_grad():
            module.weight.fill_(factor)
        if not ON_CPU:
            torch.cuda.synchronize()  # XLA's stream does not wait for torch's
        np.testing.assert_allclose(jax.jit(wrapper)(x), factor * x * x + x, rtol=1e-5, atol=1e-6)


@both_engines
def test_refresh_updates_the_weights_of_compiled_programs(made_by):
    module = Polynomial()
    wrapper = torchcall.TorchModuleWrapper(made_by(module))
    call, x = jax.jit(wrapper), numbers(0)
    for factor in (1.0, 3.0, -2.0):
        with torch.no_grad():
            module.weight.fill_(factor)
        wrapper.refresh()
        for _ in range(3):
            np.testing.assert_allclose(call(x), factor * x * x + x, rtol=1e-5, atol=1e-6)


class AddsInPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1.0)


@pytest.mark.parametrize("cuda_graph", MODES)
@both_engines
def test_inputs_are_never_written_to(made_by, cuda_graph):
    wrapper = torchcall.TorchModuleWrapper(made_by(AddsInPlace()), cuda_graph=cuda_graph)
    x = jnp.asarray(numbers(0))
    for _ in range(4):
        np.testing.assert_array_equal(jax.jit(wrapper)(x), numbers(0) + 1)
    np.testing.assert_array_equal(x, numbers(0))


class Retains(nn.Module):
    """Returns the sum of this call's input and the previous one's."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.zeros(4, 3, device=TORCH_DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        result = x + self.last
        self.last = x
        return result


def test_a_retained_input_is_a_private_copy():
    wrapper = torchcall.TorchModuleWrapper(Retains(), output_spec=like_input, cuda_graph="off")
    call, last = jax.jit(wrapper), np.zeros((4, 3), np.float32)
    for seed in range(4):
        x = numbers(seed)
        np.testing.assert_array_equal(call(jnp.asarray(x)), x + last)
        last = x


@pytest.mark.parametrize("cuda_graph", MODES)
def test_loops_branches_and_donated_buffers(cuda_graph):
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(Polynomial()), cuda_graph=cuda_graph)
    weight, x = np.array([1.5, -2.0, 0.25]), 0.1 * numbers(0)
    expected = x.astype(float)
    for _ in range(10):
        expected = weight * expected * expected + expected

    def scanned(x):
        return jax.lax.scan(lambda x, _: (wrapper(x), None), x, None, length=10)[0]

    def looped(x):
        return jax.lax.while_loop(lambda c: c[0] < 10, lambda c: (c[0] + 1, wrapper(c[1])), (0, x))

    def branched(x):
        step = lambda _, x: jax.lax.cond(x[0, 0] < 1e9, wrapper, lambda x: x, x)  # noqa: E731
        return jax.lax.fori_loop(0, 10, step, x)

    for program in (scanned, lambda x: looped(x)[1], branched):
        np.testing.assert_allclose(jax.jit(program)(x), expected, rtol=1e-4, atol=1e-5)
    if not ON_CPU:  # not every CPU backend can donate
        donated = jax.jit(wrapper, donate_argnums=0)(jnp.asarray(x))
        np.testing.assert_allclose(donated, weight * x * x + x, rtol=1e-5, atol=1e-6)


@needs_gpu
def test_the_models_work_is_ordered_with_xlas():
    """The model reads a late result of XLA, and XLA reads the model's result at once."""
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(Polynomial()), cuda_graph="auto")
    weight, size = np.array([1.5, -2.0, 0.25]), 2000

    @jax.jit
    def program(matrix, x):
        power = jax.lax.fori_loop(0, 50, lambda _, m: (m @ matrix) / size, matrix)
        late = x + 0 * power[:3, :3]
        return wrapper(late) * 2, late

    matrix = jnp.ones((size, size))
    for seed in range(5):
        x = numbers(seed, 3, 3)
        found, late = program(matrix, x)
        np.testing.assert_allclose(late, x)
        np.testing.assert_allclose(found, 2 * (weight * x * x + x), rtol=1e-5, atol=1e-5)
