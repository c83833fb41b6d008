"""Captures invalidated by other threads or by Ctrl-C. Run by test_simulated_devices.py."""

import itertools
import signal
import threading
import warnings
from collections.abc import Callable
from unittest.mock import patch

import jax
import numpy as np
import pytest
import torch
from devices.machine import OTHER_STREAM, STREAM
from devices.potentials import Forces, eager_forces, force_input, script
from torch import Tensor

from torchcall import TorchModuleWrapper
from torchcall._cuda import capture as _capture

X = np.arange(12, dtype=np.float32).reshape(3, 4)
SAME = jax.ShapeDtypeStruct(X.shape, X.dtype)
ENGINES = pytest.mark.parametrize("make", [script, eager_forces], ids=["TorchScript", "eager"])
MODES = pytest.mark.parametrize("mode", ["auto", "require"])


def on_another_thread(function: Callable[[], object]) -> list[str]:
    """Runs the function on another thread. Returns the errors raised there."""
    errors = []

    def run() -> None:
        try:
            function()
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return errors


def synchronise_on_another_thread() -> None:
    (error,) = on_another_thread(torch.cuda.synchronize)
    assert "operation not permitted when stream is capturing" in error


def double_while(disturb: Callable[[], object], **options) -> TorchModuleWrapper:
    """`(x + 0) * 2`. In each capture, `disturb` is called between the two operators."""

    def model(x: Tensor) -> Tensor:
        y = x + 0
        if torch.cuda.is_current_stream_capturing():
            disturb()
        return y * 2

    return TorchModuleWrapper(model, output_spec=SAME, **options)


def disturbance(times: int) -> Callable[[], None]:
    """In the first `times` captures, another thread synchronises with the device."""
    left = [times]

    def disturb() -> None:
        left[0] -= 1
        if left[0] >= 0:
            synchronise_on_another_thread()

    return disturb


def captures_after(f: TorchModuleWrapper, calls, n: int) -> list[int]:
    counts = []
    for i in range(n):
        np.testing.assert_array_equal(calls(X + i), 2 * (X + i))
        counts.append(f.stats()["graph_captures"])
    return counts


@MODES
def test_the_next_call_retries_a_capture_that_another_thread_invalidated(machine, mode):
    f = double_while(disturbance(1), cuda_graph=mode)
    assert captures_after(f, machine.prepared(f, X), 5) == [0, 0, 1, 1, 1]
    stats = f.stats()
    assert (stats["graph_replays"], stats["calls"], stats["fallback"]) == (2, 5, None)


@MODES
def test_the_third_attempt_is_made_after_32_more_calls(machine, mode):
    f = double_while(disturbance(2), cuda_graph=mode)
    assert captures_after(f, machine.prepared(f, X), 37) == [0] * 34 + [1] * 3
    assert f.stats()["fallback"] is None


def test_after_three_invalidated_captures_calls_run_without_a_graph(machine):
    disturb = disturbance(1000)
    f = double_while(disturb)
    calls = machine.prepared(f, X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert captures_after(f, calls, 34) == [0] * 34
        assert f.stats()["fallback"] is None
        assert captures_after(f, calls, 100) == [0] * 100
    (warned,) = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    fallback = f.stats()["fallback"]
    assert fallback in warned
    assert "all 3 captures were invalidated" in fallback
    assert "previous error during capture" in fallback
    assert len(_capture._invalidated) == 3
    assert machine.driver.log("cuGraphLaunch") == []


def test_with_require_the_third_invalidated_capture_is_an_error(machine):
    f = double_while(disturbance(1000), cuda_graph="require")
    calls = machine.prepared(f, X)
    captures_after(f, calls, 34)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="all 3 captures were invalidated"):
            calls(X)


@ENGINES
def test_a_capture_that_is_invalidated_at_its_end_is_retried(machine, make):
    end, disturb = torch.cuda.CUDAGraph.capture_end, disturbance(1)

    def disturbed_end(graph) -> None:
        disturb()
        end(graph)

    f = make(Forces())
    calls = machine.prepared(f, *force_input())
    with patch.object(torch.cuda.CUDAGraph, "capture_end", disturbed_end):
        for seed in range(5):
            x = force_input(seed)
            for g, e in zip(calls(*x), f(*x), strict=True):
                np.testing.assert_array_equal(g, e)
    stats = f.stats()
    assert (stats["graph_captures"], stats["graph_replays"]) == (1, 2)
    assert stats["fallback"] is None


def test_a_model_that_swallows_cudas_error_is_tried_three_times(machine):
    def synchronise() -> None:
        with pytest.raises(RuntimeError, match="not permitted"):
            torch.cuda.synchronize()

    f = double_while(synchronise)
    calls = machine.prepared(f, X)
    with pytest.warns(RuntimeWarning, match="all 3 captures were invalidated"):
        captures_after(f, calls, 40)


def test_a_model_that_synchronises_itself_is_refused_at_once(machine):
    f = double_while(torch.cuda.synchronize)
    calls = machine.prepared(f, X)
    calls(X)
    with pytest.warns(RuntimeWarning, match="not permitted when stream is capturing"):
        calls(X)
    assert len(_capture._invalidated) == 1


def test_a_global_capture_by_another_thread_is_not_attributed_to_the_model(machine):
    """Meanwhile allocations fail with the same text."""
    forbidden = [True]

    def model(x: Tensor) -> Tensor:
        ours = machine.device.current_stream() not in (0, STREAM)
        if ours and forbidden and forbidden.pop():
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        return x * 2

    f = TorchModuleWrapper(model, output_spec=SAME)
    assert captures_after(f, machine.prepared(f, X), 4) == [0, 0, 1, 1]


def test_a_refresh_resets_the_number_of_attempts(machine):
    f = double_while(disturbance(2))
    calls = machine.prepared(f, X)
    captures_after(f, calls, 35)
    f.refresh()
    assert captures_after(f, calls, 2) == [2, 2]


def test_torchs_generator_is_repaired_even_if_the_repair_is_invalidated(machine):
    end = torch.cuda.CUDAGraph.capture_end

    def disturbed_end(graph) -> None:
        synchronise_on_another_thread()
        end(graph)

    f = double_while(lambda: None)
    calls = machine.prepared(f, X)
    with patch.object(torch.cuda.CUDAGraph, "capture_end", disturbed_end):
        captures_after(f, calls, 2)
    generator = machine.generators[0]
    assert (generator.capturing, generator.states_set) == (False, 1)
    captures_after(f, calls, 2)
    assert f.stats()["graph_replays"] == 1


# Ctrl-C


@MODES
def test_an_interrupt_is_raised_after_the_capture(machine, mode):
    f = double_while(lambda: signal.raise_signal(signal.SIGINT), cuda_graph=mode)
    calls = machine.prepared(f, X)
    calls(X)
    with pytest.raises(KeyboardInterrupt):
        calls(X)
    np.testing.assert_array_equal(calls(X), 2 * X)
    stats = f.stats()
    assert (stats["graph_captures"], stats["graph_replays"], stats["fallback"]) == (1, 1, None)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_reaches_the_users_own_handler(machine):
    captures = []
    before = signal.signal(signal.SIGINT, lambda *_: captures.append(f.stats()["graph_captures"]))
    try:
        f = double_while(lambda: signal.raise_signal(signal.SIGINT))
        assert captures_after(f, machine.prepared(f, X), 3) == [0, 1, 1]
    finally:
        signal.signal(signal.SIGINT, before)
    assert captures == [1]


@pytest.mark.parametrize("ignored", [False, True], ids=["handled", "ignored"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("nth", [1, 2, 3, 5], ids=["first", "observed", "warm-up", "captured"])
def test_a_model_that_raises_an_interrupt_is_captured_later(machine, ignored, kind, nth):
    """Whatever SIGINT does, and in whichever run of the model before its capture."""
    runs = itertools.count(1)

    def model(x: Tensor) -> Tensor:
        y = x + 0
        if next(runs) == nth:
            raise kind
        return y * 2

    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else before)
    try:
        f = TorchModuleWrapper(model, output_spec=SAME)
        calls = machine.prepared(f, X)
        if nth > 1:
            calls(X)
        with pytest.raises(kind):
            calls(X)
        captures_after(f, calls, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    np.testing.assert_array_equal(calls(X), 2 * X)
    assert f.stats()["graph_captures"] == 1
    assert f.stats()["fallback"] is None


# Streams


def test_work_on_torchs_streams_during_a_capture_is_not_captured(machine):
    others = []

    def enqueue() -> None:
        for _ in range(64):  # more than torch's pool
            with torch.cuda.stream(torch.cuda.Stream()):
                others.append(torch.ones(3, device="cuda:0").exp())

    f = double_while(lambda: on_another_thread(enqueue))
    calls = machine.prepared(f, X)
    captures_after(f, calls, 2)
    assert len(others) == 64
    machine.device.reset()
    np.testing.assert_array_equal(calls(X), 2 * X)
    replayed = machine.device.names("replay")
    assert "aten::add.Tensor" in replayed
    assert "aten::exp" not in replayed


def test_captures_on_a_device_share_one_stream(machine):
    machine.driver.place_stream(OTHER_STREAM, 1)
    used = []

    def note() -> None:
        device = machine.device.current_device()
        used.append((device, machine.device.current_stream(device)))

    for _ in range(2):
        calls = machine.prepared(double_while(note), X)
        for device, stream in ((0, STREAM), (1, OTHER_STREAM)):
            for _ in range(2):
                np.testing.assert_array_equal(calls(X, ordinal=device, stream=stream), 2 * X)
    assert [device for device, _ in used] == [0, 1, 0, 1]
    assert len(set(used)) == len({stream for _, stream in used}) == 2
    created = machine.driver.log("cuStreamCreate")
    assert len(created) <= 2  # created by this test or an earlier one
    assert all(call.arguments == (1,) for call in created)  # CU_STREAM_NON_BLOCKING
