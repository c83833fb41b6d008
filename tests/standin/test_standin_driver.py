"""Tests of the simulated CUDA driver: documented behaviour and the call log."""

import ctypes
import threading

import numpy as np
import pytest
from standin.driver import Driver

GRAPH, STREAM, OTHER_STREAM = 0x77, 0x51, 0x52


@pytest.fixture
def driver():
    driver = Driver()
    driver.reset()
    yield driver
    driver.open_latch()
    driver.reset()


@pytest.fixture
def cuda(driver):
    """The library under the driver's name, with a context on the test's thread."""
    cuda = ctypes.CDLL("libcuda.so.1")
    cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(driver.context()))
    yield cuda
    cuda.cuCtxPopCurrent_v2(None)
    assert driver.context_depth() == 0


def create(function, *arguments) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    assert function(ctypes.byref(handle), *arguments) == 0
    return handle


def recorded_event(cuda) -> ctypes.c_void_p:
    event = create(cuda.cuEventCreate, 2)
    assert cuda.cuEventRecord(event, ctypes.c_void_p(STREAM)) == 0
    return event


def test_dlopen_finds_the_simulated_driver(driver):
    cuda = ctypes.CDLL("libcuda.so.1")
    assert cuda._handle == driver.library._handle


def test_a_replay_copies_and_launches_and_is_logged_in_order(driver, cuda):
    static, given = np.zeros(4, np.float32), np.arange(4, dtype=np.float32)
    seen = []
    driver.on_launch(GRAPH, lambda: seen.append(static * 2))
    stream = ctypes.c_void_p(STREAM)
    exec_ = create(cuda.cuGraphInstantiateWithFlags, ctypes.c_void_p(GRAPH), ctypes.c_ulonglong(0))
    to, source = ctypes.c_uint64(static.ctypes.data), ctypes.c_uint64(given.ctypes.data)

    assert cuda.cuMemcpyDtoDAsync_v2(to, source, ctypes.c_size_t(given.nbytes), stream) == 0
    assert cuda.cuGraphLaunch(exec_, stream) == 0
    np.testing.assert_array_equal(seen, [given * 2])
    copy, launch = driver.log("cuMemcpyDtoDAsync_v2", "cuGraphLaunch")
    assert copy.arguments == (static.ctypes.data, given.ctypes.data, given.nbytes, STREAM)
    assert launch.arguments == (exec_.value, STREAM)
    assert copy.time < launch.time
    assert {call.thread for call in driver.log()} == {threading.get_native_id()}

    assert driver.live_execs() == 1
    assert cuda.cuGraphExecDestroy(exec_) == 0
    assert driver.live_execs() == 0
    assert cuda.cuGraphLaunch(exec_, stream) == 400


def test_a_launch_callback_may_call_the_driver(driver, cuda):
    driver.on_launch(GRAPH, lambda: cuda.cuEventDestroy_v2(event))
    event = recorded_event(cuda)
    exec_ = create(cuda.cuGraphInstantiateWithFlags, ctypes.c_void_p(GRAPH), ctypes.c_ulonglong(0))
    assert cuda.cuGraphLaunch(exec_, None) == 0
    assert driver.live_events() == 0
    assert driver.names()[-2:] == ["cuEventDestroy_v2", "cuGraphLaunch"]


def test_an_injected_failure_happens_once_and_has_no_effect(driver, cuda):
    driver.fail("cuEventCreate", nth=2, code=2)
    create(cuda.cuEventCreate, 2)
    event = ctypes.c_void_p()
    assert cuda.cuEventCreate(ctypes.byref(event), 2) == 2
    assert event.value is None
    create(cuda.cuEventCreate, 2)
    assert driver.live_events() == 2
    driver.fail("*", code=700)
    assert cuda.cuStreamSynchronize(None) == 700
    assert [call.result for call in driver.log("cuEventCreate", "cuStreamSynchronize")] == [
        0,
        2,
        0,
        700,
    ]
    name = ctypes.c_char_p()
    assert cuda.cuGetErrorName(700, ctypes.byref(name)) == 0
    assert name.value == b"CUDA_ERROR_ILLEGAL_ADDRESS"


def test_contexts_are_thread_local_and_required(driver, cuda):
    driver.place_stream(OTHER_STREAM, 1)
    context = create(lambda out: cuda.cuStreamGetCtx(ctypes.c_void_p(OTHER_STREAM), out))
    assert context.value == driver.context(1) != driver.context(0)
    results = []

    def elsewhere() -> None:
        event = ctypes.c_void_p()
        results.append(cuda.cuEventCreate(ctypes.byref(event), 2))
        cuda.cuCtxPushCurrent_v2(context)
        results.extend([cuda.cuEventCreate(ctypes.byref(event), 2), driver.context_depth()])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert results == [201, 0, 1]
    assert driver.context_depth() == 1


def test_a_stream_belongs_to_the_device_of_the_current_context(driver, cuda):
    cuda.cuCtxPushCurrent_v2(ctypes.c_void_p(driver.context(1)))
    stream = create(cuda.cuStreamCreate, 1)
    cuda.cuCtxPopCurrent_v2(None)
    context = create(lambda out: cuda.cuStreamGetCtx(stream, out))
    assert context.value == driver.context(1)


@pytest.mark.parametrize("waits_for", ["an event", "a stream", "a stream that waits for an event"])
def test_a_wait_lasts_until_the_latch_opens(driver, cuda, waits_for):
    done = threading.Event()
    with driver.latch():
        event, stream = recorded_event(cuda), ctypes.c_void_p(STREAM)
        if waits_for == "a stream":
            one = np.zeros(1)
            address = ctypes.c_uint64(one.ctypes.data)
            cuda.cuMemcpyDtoDAsync_v2(address, address, ctypes.c_size_t(one.nbytes), stream)
        elif waits_for == "a stream that waits for an event":
            stream = ctypes.c_void_p(OTHER_STREAM)
            cuda.cuStreamWaitEvent(stream, event, 0)

        def wait() -> None:
            if waits_for == "an event":
                assert cuda.cuEventSynchronize(event) == 0
            else:
                assert cuda.cuStreamSynchronize(stream) == 0
            done.set()

        thread = threading.Thread(target=wait)
        thread.start()
        driver.await_waiting()
        assert not done.is_set()
    thread.join()
    assert done.is_set()
    assert driver.waiting() == 0


def test_work_from_before_the_latch_closed_is_complete(driver, cuda):
    event = recorded_event(cuda)
    with driver.latch(timeout=0):
        assert cuda.cuEventSynchronize(event) == 0
        assert cuda.cuStreamSynchronize(ctypes.c_void_p(STREAM)) == 0


def test_a_latch_that_stays_closed_times_out(driver, cuda):
    with driver.latch(timeout=0.01):
        assert cuda.cuEventSynchronize(recorded_event(cuda)) == 702
