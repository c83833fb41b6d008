"""Captures and replays on simulated devices. Run by test_simulated_devices.py."""

import gc
import threading
import time
import warnings

import jax
import numpy as np
import pytest
import torch
from devices.machine import OTHER_STREAM, STREAM, Machine
from devices.potentials import Forces, eager_forces, force_input, script
from torch import Tensor, nn

from torchcall import TorchModuleWrapper, _bridge

X = np.arange(12, dtype=np.float32).reshape(3, 4)
SAME = jax.ShapeDtypeStruct(X.shape, X.dtype)
ENGINES = pytest.mark.parametrize("make", [script, eager_forces], ids=["TorchScript", "eager"])


def double(x: Tensor) -> Tensor:
    return x * 2


def scripted_double(**options):
    return TorchModuleWrapper(torch.jit.script(double), output_spec=SAME, **options)


@ENGINES
def test_the_second_call_is_captured_and_later_calls_replay(machine, make):
    f = make(Forces())
    calls = machine.prepared(f, *force_input())
    for seed in range(5):
        x = force_input(seed)
        expected = f(*x)
        for g, e in zip(calls(*x), expected, strict=True):
            np.testing.assert_array_equal(g, e)
        stats = f.stats()
        assert (stats["graph_captures"], stats["graph_replays"]) == (seed >= 1, max(seed - 1, 0))
    assert f.stats()["fallback"] is None


def test_a_replay_copies_and_launches_on_the_callers_stream(machine):
    f = scripted_double()
    calls = machine.prepared(f, X)
    calls(X)
    calls(X)
    before = len(machine.driver.log())
    machine.device.reset()
    np.testing.assert_array_equal(calls(5 * X), 10 * X)
    log = machine.driver.log()[before:]
    assert [call.function for call in log] == [
        "cuCtxPushCurrent_v2",
        "cuMemcpyDtoDAsync_v2",
        "cuGraphLaunch",
        "cuMemcpyDtoDAsync_v2",
        "cuEventRecord",
        "cuCtxPopCurrent_v2",
    ]
    copy_in, launch, copy_out, record = log[1:5]
    assert {copy_in.arguments[-1], launch.arguments[-1], copy_out.arguments[-1]} == {STREAM}
    assert record.arguments[-1] == STREAM
    assert copy_in.arguments[2] == copy_out.arguments[2] == X.nbytes
    assert machine.device.log("sync") == []


def test_a_graph_is_instantiated_with_torchs_flags(machine):
    calls = machine.prepared(scripted_double(), X)
    for _ in range(2):
        calls(X)
    (instantiated,) = machine.driver.log("cuGraphInstantiateWithFlags")
    assert instantiated.arguments[-1] & 1  # CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH


def test_replays_on_two_streams_are_ordered(machine):
    calls = machine.prepared(scripted_double(), X)
    for stream in (STREAM, STREAM, STREAM, OTHER_STREAM, STREAM):
        np.testing.assert_array_equal(calls(X, stream=stream), 2 * X)
    names = machine.driver.names()
    waits = machine.driver.log("cuStreamWaitEvent")
    assert [wait.arguments[0] for wait in waits] == [OTHER_STREAM, STREAM]
    records = [i for i, name in enumerate(names) if name == "cuEventRecord"]
    after = names[records[0] :]
    assert after.index("cuStreamWaitEvent") < after.index("cuMemcpyDtoDAsync_v2")


def test_a_graph_is_destroyed_after_its_last_replay(machine):
    calls = machine.prepared(scripted_double(), X)
    calls(X)
    machine.device.reset()
    calls(X)
    held = machine.device.live_bytes()
    with machine.driver.latch():
        calls(X)
        release = threading.Thread(target=calls.__dict__.pop, args=("plan",))
        release.start()
        machine.driver.await_waiting()
        assert machine.driver.live_execs() == 1
        assert machine.device.live_bytes() == held
    release.join(10)
    names = machine.driver.names()
    assert names.index("cuEventSynchronize") < names.index("cuGraphExecDestroy")


@ENGINES
def test_graph_memory_is_freed_with_the_plan(machine, make):
    f = make(Forces())
    before = machine.device.live_bytes()
    calls = machine.prepared(f, *force_input())
    for seed in range(3):
        calls(*force_input(seed))
    assert machine.device.live_bytes() > before
    del f, calls
    jax.clear_caches()
    for _ in range(20):  # XLA's threads may still hold the last executable
        gc.collect()
        if machine.device.live_bytes() == before:
            break
        gc.unfreeze()
        time.sleep(0.1)
    assert machine.device.live_bytes() == before


def test_a_plan_is_captured_once_per_device(machine):
    f = scripted_double()
    calls = machine.prepared(f, X)
    machine.driver.place_stream(OTHER_STREAM, 1)
    for _ in range(3):
        np.testing.assert_array_equal(calls(X, ordinal=0), 2 * X)
        np.testing.assert_array_equal(calls(X, ordinal=1, stream=OTHER_STREAM), 2 * X)
    stats = f.stats()
    assert (stats["graph_captures"], stats["graph_replays"]) == (2, 2)


def test_cuda_graph_off_captures_nothing(machine):
    f = scripted_double(cuda_graph="off")
    calls = machine.prepared(f, X)
    for _ in range(4):
        np.testing.assert_array_equal(calls(X), 2 * X)
    assert machine.driver.log() == []
    assert f.stats()["graph_captures"] == 0


@ENGINES
def test_new_weights_are_captured_again(machine, make):
    model = Forces()
    f = make(model)
    x = force_input()
    calls = machine.prepared(f, *x)
    for _ in range(3):
        before = calls(*x)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    f.refresh()
    expected = f(*x)
    assert not np.allclose(before[1], expected[1])
    for _ in range(3):
        for g, e in zip(calls(*x), expected, strict=True):
            np.testing.assert_array_equal(g, e)
    assert f.stats()["graph_captures"] == 2
    assert machine.driver.live_execs() == 1


def test_weights_are_not_copied_during_a_capture(machine):
    f = scripted_double(cuda_graph="off")
    calls = machine.prepared(f, X)
    calls(X)
    capturing, captured = threading.Event(), threading.Event()

    def capture() -> None:
        capturing.set()
        assert captured.wait(10)

    threads = [threading.Thread(target=_bridge.between_captures, args=(capture,))]
    threads[0].start()
    capturing.wait(10)
    calls(X)  # needs no weights, so it does not wait
    f._model.replace(f._load())
    threads += [threading.Thread(target=do) for do in (f.refresh, lambda: calls(X))]
    for thread in threads[1:]:
        thread.start()
    for thread in threads[1:]:
        thread.join(0.05)
        assert thread.is_alive()
    captured.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert f.stats()["fallback"] is None


class Caching(nn.Module):
    """Caches a table for the last input shape."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.table.shape != x.shape[:1]:
            self.table = torch.arange(1.0, 1 + len(x), device=x.device)
        return x * self.table[:, None]


def test_a_graph_retains_the_tensors_of_the_captured_module(machine):
    f = TorchModuleWrapper(Caching(), output_spec=lambda x: x)
    tall = np.ones((5, 4), np.float32)
    calls, others = machine.prepared(f, X), machine.prepared(f, tall)
    factors = np.arange(1, 6, dtype=np.float32)[:, None]
    for _ in range(3):
        np.testing.assert_array_equal(calls(X), X * factors[:3])
    np.testing.assert_array_equal(others(tall), tall * factors)
    gc.collect()
    torch.full((3,), 99.0, device="cuda:0")
    np.testing.assert_array_equal(calls(2 * X), 2 * X * factors[:3])
    assert f.stats()["graph_replays"] == 2


def test_a_graph_retains_the_tensors_that_a_function_refers_to(machine):
    tables: dict[int, list[Tensor]] = {}

    def tabled(x: Tensor) -> Tensor:
        if len(x) not in tables:
            tables.clear()
            tables[len(x)] = [torch.arange(1.0, 1 + len(x), device=x.device)]
        return x * tables[len(x)][0][:, None]

    f = TorchModuleWrapper(tabled, output_spec=lambda x: x)
    tall = np.ones((5, 4), np.float32)
    calls, others = machine.prepared(f, X), machine.prepared(f, tall)
    factors = np.arange(1, 6, dtype=np.float32)[:, None]
    for _ in range(3):
        np.testing.assert_array_equal(calls(X), X * factors[:3])
    np.testing.assert_array_equal(others(tall), tall * factors)
    np.testing.assert_array_equal(calls(2 * X), 2 * X * factors[:3])
    assert f.stats()["graph_replays"] == 2


def test_the_least_recently_launched_graph_is_evicted(machine):
    _bridge.set_graph_limit(2)
    fs = [scripted_double() for _ in range(3)]
    calls = [machine.prepared(f, X) for f in fs]
    for order in ((0, 1), (0, 1), (1, 0), (2, 2, 2), (0, 1, 2)):
        for i in order:
            np.testing.assert_array_equal(calls[i](X), 2 * X)
    assert machine.driver.live_execs() == 2
    assert [f.stats()["fallback"] is None for f in fs] == [True, False, True]
    assert "evicted" in fs[1].stats()["fallback"]


def test_concurrent_replays_on_different_streams_do_not_mix(machine):
    calls = machine.prepared(scripted_double(), X)
    wrong = []

    def loop(k: int) -> None:
        for i in range(50):
            x = X + 100 * k + i
            if not np.array_equal(calls(x, stream=0x8000 + 16 * k), 2 * x):
                wrong.append((k, i))

    threads = [threading.Thread(target=loop, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert wrong == []


# Driver errors


def functions_of(machine: Machine) -> list[str]:
    """The driver functions called by a first call, a capture, two replays and the clean-up."""
    calls = machine.prepared(scripted_double(), X)
    for stream in (STREAM, STREAM, STREAM, OTHER_STREAM):
        calls(X, stream=stream)
    return machine.driver.names()


def test_any_driver_error_is_reported_and_leaks_nothing(machine):
    names = functions_of(machine)
    assert len(names) > 15
    for nth, name in enumerate(names, 1):
        if name == "cuCtxPopCurrent_v2":
            continue  # the context would remain pushed, by the driver's own fault
        machine.reset()
        f = scripted_double()
        calls = machine.prepared(f, X)
        machine.driver.fail("*", nth, 2)
        errors = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for i, stream in enumerate((STREAM, STREAM, STREAM, OTHER_STREAM, STREAM)):
                try:
                    np.testing.assert_array_equal(calls(X + i, stream=stream), 2 * (X + i))
                except RuntimeError as error:
                    errors.append(str(error))
        fallback = f.stats()["fallback"]
        texts = errors + [fallback] * (fallback is not None)
        assert len(texts) <= 1
        for text in texts:
            assert "failed with CUDA_ERROR_OUT_OF_MEMORY (2)" in text
        del calls, f
        gc.collect()
        assert machine.driver.live_execs() == 0, (nth, name)
        assert machine.driver.live_events() == 0, (nth, name)
        assert machine.driver.context_depth() == 0, (nth, name)


def test_a_device_fault_recommends_a_restart(machine):
    calls = machine.prepared(scripted_double(), X)
    calls(X)
    calls(X)
    machine.driver.fail("cuGraphLaunch", 1, 700)
    with pytest.raises(RuntimeError, match="launching the CUDA graph failed with CUDA_ERROR_ILLEG"):
        calls(X)
    machine.driver.fail("cuGraphLaunch", 1, 700)
    with pytest.raises(RuntimeError, match="CUDA_LAUNCH_BLOCKING"):
        calls(X)


# The GIL


def test_a_capture_does_not_deadlock_with_threads_that_run_jax(machine):
    done = threading.Event()

    def jax_loop() -> None:
        g = jax.jit(lambda x: x + 1)
        while not done.is_set():
            jax.block_until_ready(g(X))

    thread = threading.Thread(target=jax_loop)
    thread.start()
    try:
        for _ in range(4):
            f = eager_forces(Forces())
            calls = machine.prepared(f, *force_input())
            for _ in range(3):
                calls(*force_input())
            assert f.stats()["graph_captures"] == 1
    finally:
        done.set()
        thread.join(10)
    assert not thread.is_alive()
