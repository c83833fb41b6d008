"""Errors on a GPU: their messages, and that the process stays usable."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gpu_models import ON_CPU, assert_healthy, both_engines, needs_gpu, numbers
from models import RaisesWhenNegative, error_of, like_input, run_python
from torch import Tensor, nn

import torchcall

pytestmark = pytest.mark.gpu
DEVICE = "cpu" if ON_CPU else "cuda"


class MakesATensorOnTheHost(nn.Module):
    """Creates a tensor without naming a device."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(3)


@needs_gpu
@pytest.mark.parametrize("cuda_graph", ["off", "auto"])
@both_engines
def test_a_model_that_mixes_devices(made_by, cuda_graph):
    wrapper = torchcall.TorchModuleWrapper(
        made_by(MakesATensorOnTheHost()), output_spec=like_input, cuda_graph=cuda_graph
    )
    text = error_of(lambda: jax.jit(wrapper)(numbers(0)))
    assert "MakesATensorOnTheHost" in text
    assert "same device" in text
    assert_healthy()


class ReturnsAHostTensor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cpu()


@needs_gpu
def test_an_output_on_another_device():
    wrapper = torchcall.TorchModuleWrapper(
        ReturnsAHostTensor(), output_spec=like_input, cuda_graph="off"
    )
    text = error_of(lambda: jax.jit(wrapper)(numbers(0)))
    assert "cpu" in text
    assert "cuda" in text
    assert_healthy()


@both_engines
def test_an_exception_in_the_model(made_by):
    wrapper = torchcall.TorchModuleWrapper(
        made_by(RaisesWhenNegative()), output_spec=like_input, cuda_graph="off"
    )
    text = error_of(lambda: jax.jit(wrapper)(-np.ones((4, 3), np.float32)))
    assert "the sum is negative" in text
    np.testing.assert_array_equal(jax.jit(wrapper)(np.ones((4, 3), np.float32)), 2.0)
    assert_healthy()


class WrongShape(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:2]


@both_engines
def test_an_output_of_the_wrong_shape(made_by):
    wrapper = torchcall.TorchModuleWrapper(made_by(WrongShape()), output_spec=like_input)
    for _ in range(3):
        text = error_of(lambda: jax.jit(wrapper)(numbers(0)))
        assert "expected" in text
        assert "(4, 3)" in text
        assert "(2, 3)" in text
    assert_healthy()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs"
)
def test_each_device_has_a_replica():
    wrapper = torchcall.TorchModuleWrapper(torch.nn.Linear(3, 3))
    for device in jax.devices("cuda")[:2]:
        x = jax.device_put(numbers(0), device)
        assert jax.jit(wrapper)(x).devices() == {device}
    assert {"cuda:0", "cuda:1"} <= set(wrapper.stats()["devices"])


HEAD = """
import os, sys
import jax, jax.numpy as jnp, numpy as np, torch, torchcall

gpu = {gpu}
jax.config.update("jax_default_device", jax.devices("cuda" if gpu else "cpu")[0])

def tried(what, call):
    try:
        jax.block_until_ready(call())
        print(what, "works")
    except Exception as error:
        print(what, "raises", type(error).__name__, " ".join(str(error).split())[:3000])
    sys.stdout.flush()
"""

TORCH_MEMORY = """
if gpu:
    torch.cuda.set_per_process_memory_fraction(0.05)

class Takes(torch.nn.Module):
    def forward(self, x, size: int):
        return x + torch.zeros(size, dtype=torch.uint8, device=x.device).sum()

for mode in ("off", "auto"):
    takes = torchcall.TorchModuleWrapper(Takes(), output_spec=lambda x, size: x, cuda_graph=mode)
    x = jnp.ones(3)
    tried(mode + " before", lambda: jax.jit(lambda x: takes(x, 1000))(x))
    tried(mode + " large", lambda: jax.jit(lambda x: takes(x, 1 << (37 if gpu else 50)))(x))
    for _ in range(4):
        tried(mode + " after", lambda: jax.jit(lambda x: takes(x, 1000))(x))
    print(mode, "replays", takes.stats()["graph_replays"])
"""


def test_torch_out_of_memory_names_the_remedy_and_both_frameworks_stay_usable(tmp_path):
    done = run_python(
        tmp_path,
        HEAD.format(gpu=not ON_CPU) + TORCH_MEMORY,
        fresh=True,
        XLA_PYTHON_CLIENT_PREALLOCATE="false",
    )
    lines = done.stdout.splitlines()
    for mode in ("off", "auto"):
        assert f"{mode} before works" in lines
        assert lines.count(f"{mode} after works") == 4
        large = next(line for line in lines if line.startswith(f"{mode} large"))
        assert "torchcall: " in large
        if not ON_CPU:
            assert "out of memory" in large
            assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in large
    if not ON_CPU:
        assert "auto replays 0" not in lines


XLA_MEMORY = """
double = torchcall.TorchModuleWrapper(torch.nn.Identity())
tried("before", lambda: jax.jit(double)(jnp.ones(3)))
tried("large", lambda: jnp.ones((1 << 33,), jnp.float32))
for _ in range(4):
    tried("after", lambda: jax.jit(double)(jnp.ones(3)))
"""


@needs_gpu
def test_xla_out_of_memory_leaves_torchcall_usable(tmp_path):
    done = run_python(
        tmp_path,
        HEAD.format(gpu=True) + XLA_MEMORY,
        fresh=True,
        XLA_PYTHON_CLIENT_MEM_FRACTION=".05",
    )
    lines = done.stdout.splitlines()
    assert "before works" in lines
    assert any(line.startswith("large raises") for line in lines), done.stdout
    assert lines.count("after works") == 4


FAULT = """
class Gather(torch.nn.Module):
    def forward(self, x, index):
        return x.index_select(0, index)

gather = torchcall.TorchModuleWrapper(
    torch.jit.script(Gather()), input_spec=((None, torch.int64), {}), cuda_graph="MODE"
)
call = jax.jit(lambda x, i: gather(x, i) + 1)
x = jnp.arange(4.0)
for k in range(4):
    tried("before", lambda: call(x, jnp.array([k])))
tried("fault", lambda: call(x, jnp.array([1_000_000])))
tried("next", lambda: call(x, jnp.array([0])))
with jax.default_device(jax.devices("cpu")[0]):
    on_cpu = torchcall.TorchModuleWrapper(torch.nn.Identity())
    tried("cpu", lambda: jax.jit(on_cpu)(np.ones(3, np.float32)))
print("torch on the cpu", float(torch.ones(3).sum()))
sys.stdout.flush()
os._exit(0)  # the context is lost: skip the frameworks' clean-up
"""


@pytest.mark.parametrize("cuda_graph", ["off", "auto"])
def test_a_fault_on_the_device_is_an_error_and_the_cpu_stays_usable(tmp_path, cuda_graph):
    """The kernel detects an index out of range after the call has returned."""
    program = HEAD.format(gpu=not ON_CPU) + FAULT.replace("MODE", cuda_graph)
    lines = run_python(tmp_path, program, fresh=True).stdout.splitlines()
    assert lines.count("before works") == 4
    # A replay returns before the device starts, so the next call may be the first to fail. The
    # context is lost, unless the fault was detected on the host.
    assert any(line.startswith(("fault raises", "next raises")) for line in lines), lines
    assert any(line.startswith("next ") for line in lines), lines
    assert "cpu works" in lines
    assert "torch on the cpu 3.0" in lines


def test_nonfinite_values_are_preserved():
    wrapper = torchcall.TorchModuleWrapper(torch.nn.Identity())
    x = jnp.array([np.nan, np.inf, -np.inf, -0.0], jnp.float32)
    for _ in range(3):
        np.testing.assert_array_equal(jax.jit(wrapper)(x), np.asarray(x))
