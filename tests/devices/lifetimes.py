"""Lifetimes of weights and graphs on simulated devices. Run by test_simulated_devices.py."""

import gc
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import numpy as np
import pytest
import torch
from devices.potentials import Forces, eager_forces, force_input, script
from torch import Tensor, nn

from torchcall import TorchModuleWrapper, _bridge

X = np.arange(12, dtype=np.float32).reshape(3, 4)
SAME = jax.ShapeDtypeStruct(X.shape, X.dtype)
ENGINES = pytest.mark.parametrize("make", [script, eager_forces], ids=["TorchScript", "eager"])


class Gate:
    """Holds calls half-way while it is closed."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    @contextmanager
    def closed(self, *calls) -> Iterator[None]:
        """Starts the calls on threads of their own; inside the block they are half-way."""
        self.reached.clear()
        self.opened.clear()
        threads = [threading.Thread(target=call, args=(X,)) for call in calls]
        for thread in threads:
            thread.start()
        assert self.reached.wait(10)
        try:
            yield
        finally:
            self.opened.set()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive()


gate = Gate()


@torch.jit.ignore
def pause(x: Tensor) -> Tensor:
    gate.reached.set()
    assert gate.opened.wait(10)
    return x


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return pause(x + 0) * self.weight


BOTH = pytest.mark.parametrize(
    "make", [torch.jit.script, lambda module: module], ids=["TorchScript", "eager"]
)
WEIGHT = str(4 * 4)  # bytes; no other allocation of the calls has this size


@BOTH
@pytest.mark.parametrize("refreshes", [1, 2])
def test_a_refresh_during_a_call_frees_its_weights_after_synchronising(machine, make, refreshes):
    f = TorchModuleWrapper(make(Scaling()), output_spec=SAME, cuda_graph="off")
    calls = machine.prepared(f, X)
    np.testing.assert_array_equal(calls(X), 2 * X)
    machine.device.reset()
    with gate.closed(calls):
        for _ in range(refreshes):
            f.refresh()
        assert WEIGHT not in machine.device.names("free")
    assert WEIGHT not in machine.device.names("free")
    f.refresh()
    log = machine.device.log("op", "sync", "free")
    used = [i for i, entry in enumerate(log) if entry.name == "aten::mul.Tensor"]
    freed = [i for i, entry in enumerate(log) if (entry.kind, entry.name) == ("free", WEIGHT)]
    synced = [i for i, entry in enumerate(log) if (entry.kind, entry.name) == ("sync", "device")]
    assert len(used) == len(freed) == 1
    assert any(used[0] < i < freed[0] for i in synced)
    np.testing.assert_array_equal(calls(X), 2 * X)


@BOTH
def test_a_call_on_the_cpu_does_not_synchronise_with_devices(machine, make):
    f = TorchModuleWrapper(make(Scaling()), output_spec=SAME, cuda_graph="off")
    calls = machine.prepared(f, X)
    calls(X)
    with gate.closed(calls):
        f.refresh()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        np.testing.assert_array_equal(f(X), 2 * X)
        graph.capture_end()
    f.refresh()
    assert machine.device.names("free").count(WEIGHT) == 1


@ENGINES
def test_a_new_capture_frees_the_old_weights(machine, make):
    f = make(Forces())
    calls = machine.prepared(f, *force_input())
    for seed in range(3):
        calls(*force_input(seed))
    held = machine.device.live_bytes()
    for _ in range(3):
        f.refresh()
        for seed in range(3):
            calls(*force_input(seed))
    assert machine.device.live_bytes() == held
    assert f.stats()["graph_captures"] == 4


@ENGINES
def test_a_forked_child_leaves_graphs_and_weights_to_the_parent(machine, make):
    f = make(Forces())
    calls = machine.prepared(f, *force_input())
    for seed in range(3):
        calls(*force_input(seed))
    plans, machine_calls = _bridge.live_plans(), len(machine.driver.log())
    machine.device.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns about fork itself
        child = os.fork()
    if child == 0:
        code = 1
        try:
            del f, calls
            gc.collect()
            released = _bridge.live_plans() == plans - 1
            touched = machine.device.log("sync") or len(machine.driver.log()) != machine_calls
            code = 0 if released and not touched else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert machine.driver.live_execs() == 1
    expected = f(*force_input(5))
    for g, e in zip(calls(*force_input(5)), expected, strict=True):
        np.testing.assert_array_equal(g, e)


def doubles(machine, count: int):
    def double(x: Tensor) -> Tensor:
        return x * 2

    fs = [TorchModuleWrapper(torch.jit.script(double), output_spec=SAME) for _ in range(count)]
    calls = [machine.prepared(f, X) for f in fs]
    for call in calls:
        call(X)
        call(X)
    return fs, calls


def test_an_evicted_graph_is_captured_again_once_another_is_idle(machine):
    _bridge.set_graph_limit(2)
    fs, calls = doubles(machine, 3)
    calls[1](X)
    assert "is idle" in fs[0].stats()["fallback"]
    for _ in range(520):
        calls[2](X)
        calls[0](X)
    assert [f.stats()["graph_captures"] for f in fs] == [2, 1, 1]
    assert fs[0].stats()["graph_replays"] == 520 - 2 * 256  # the first check finds all in use
    assert fs[0].stats()["fallback"] is None
    assert "evicted" in fs[1].stats()["fallback"]
    np.testing.assert_array_equal(calls[0](X), 2 * X)


def test_graphs_in_use_do_not_evict_each_other_repeatedly(machine):
    _bridge.set_graph_limit(2)
    fs, calls = doubles(machine, 3)
    for i in range(600):
        for call in calls:
            np.testing.assert_array_equal(call(X + i), 2 * (X + i))
    assert [f.stats()["graph_captures"] for f in fs] == [1, 1, 1]


def test_an_idle_graph_is_evicted_for_one_in_use(machine):
    _bridge.set_graph_limit(2)
    fs, calls = doubles(machine, 3)
    assert fs[0].stats()["fallback"] is not None
    for _ in range(300):
        calls[0](X)
    assert fs[0].stats()["fallback"] is None
    assert fs[0].stats()["graph_replays"] > 0


def test_the_next_capture_frees_graphs_of_replaced_weights(machine):
    linear = nn.Linear(4, 4)
    f = TorchModuleWrapper(torch.jit.script(linear))
    low, tall = machine.prepared(f, X), machine.prepared(f, np.ones((5, 4), np.float32))
    for _ in range(3):
        low(X)
        tall(np.ones((5, 4), np.float32))
    assert machine.driver.live_execs() == 2
    with torch.no_grad():
        linear.weight.mul_(2)
    f.refresh()
    expected = linear(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(low(X), expected, rtol=1e-5)
    assert machine.driver.live_execs() == 1
    np.testing.assert_allclose(
        tall(np.ones((5, 4), np.float32))[0], linear(torch.ones(4)).detach(), rtol=1e-5
    )
    assert machine.driver.live_execs() == 2
