"""Captures a call into a CUDA graph with `torch.cuda.CUDAGraph`. Replays need no Python.

Not yet run on a GPU: tested on simulated devices only.
"""

import gc
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch

from torchcall import _bridge
from torchcall._cuda.observation import observed
from torchcall._undocumented.of_torch import (
    clear_cublas_workspaces,
    disable_current_modes,
    remove_pool,
)

# Runs on the capture stream before the capture: libraries create their handles and workspaces on a
# stream's first use, which a capture forbids.
_WARM_UPS = 2


class Captured(NamedTuple):
    """A captured graph with its own input and output buffers.

    Attributes:
        graph: the address of the `cudaGraph_t`.
        inputs, outputs: the buffers' addresses.
        owner: holds graph and buffers; must live until the last replay has finished.
    """

    graph: int
    inputs: list[int]
    outputs: list[int]
    owner: object


class NotCaptured(NamedTuple):
    """A failed capture.

    Attributes:
        reason: why there is no graph.
        retry: whether another attempt may succeed.
    """

    reason: str
    retry: bool


class NotCapturableError(Exception):
    """The call cannot be replayed as a CUDA graph."""


class InvalidatedCaptureError(Exception):
    """The capture was invalidated, possibly by another thread."""


def capture(recording: _bridge.Recording) -> Captured | NotCaptured:
    """Captures a call. Returns the reason if that fails; raises only KeyboardInterrupt.

    Makes the call once and checks that the model did not change its own state. Runs the model twice
    on the caller's data, on a separate stream, then captures it there.

    The capture mode is thread-local: other threads may use the device meanwhile. One that
    synchronises with the whole device invalidates the capture. A model that draws random numbers is
    refused: replays outside torch would draw the same numbers each time.
    """
    try:
        with disable_current_modes():
            return _capture(recording)
    except Exception as error:
        return NotCaptured(_first_line(error), isinstance(error, InvalidatedCaptureError))


def warn(model: str, reason: str) -> None:
    """Warns that calls of a model run without a CUDA graph."""
    text = f"torchcall: {model}: runs without a CUDA graph: {reason}"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except Warning:  # with warnings as errors: no caller could catch it here
        print(text, file=sys.stderr)


def _capture(recording: _bridge.Recording) -> Captured:
    with observed() as observation:
        reason = recording.call()
    if changed := observation.changed():
        reason = f"it changes its own '{changed}', which a replay would not repeat"
    if reason:
        raise NotCapturableError(reason)
    device = torch.device("cuda", recording.ordinal)
    # Not one of torch's pooled streams: they are shared, and other threads' work would be captured.
    stream = torch.cuda.ExternalStream(recording.stream, device)
    with _deferred_interrupt(recording), torch.cuda.device(device), torch.cuda.stream(stream):
        with _graph_use() as used, _conflicting_capture(used):
            inputs = [_buffer(size, device) for size in recording.input_bytes]
            outputs = [_buffer(size, device) for size in recording.output_bytes]
            sources, targets = _addresses(inputs), _addresses(outputs)
            # Earlier work may still use this memory, and the inputs are copied on another stream,
            # the caller's.
            stream.synchronize()
            recording.copy_inputs(sources)
            before = torch.cuda.get_rng_state(device)
            try:
                for _ in range(_WARM_UPS):
                    _run(recording, sources, targets, stream.cuda_stream)
            finally:
                stream.synchronize()  # the caller's stream may use state that the model created
        if used:
            raise NotCapturableError("it uses CUDA graphs of its own")
        if not torch.equal(before, torch.cuda.get_rng_state(device)):
            raise NotCapturableError("it draws random numbers")
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with _capturing(graph, device):
            _run(recording, sources, targets, stream.cuda_stream)
        return Captured(graph.raw_cuda_graph(), sources, targets, (graph, inputs, outputs))


@contextmanager
def _conflicting_capture(used: list[str]) -> Iterator[None]:
    """Outside any capture of ours, a capture error comes from another thread's capture."""
    try:
        yield
    except RuntimeError as error:
        if not used and _is_capture_error(error):
            raise InvalidatedCaptureError(_first_line(error)) from error
        raise


def _run(recording: _bridge.Recording, sources: list[int], targets: list[int], stream: int) -> None:
    try:
        recording.run(sources, targets, stream)
    except RuntimeError as error:
        if str(error).startswith("raised KeyboardInterrupt"):
            raise KeyboardInterrupt from error
        raise


@contextmanager
def _deferred_interrupt(recording: _bridge.Recording) -> Iterator[None]:
    """Defers Ctrl-C to the end of the capture.

    Raised earlier, it would be lost inside XLA, or leave a stream in capture mode.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.get_ident() != threading.main_thread().ident or not callable(handler):
        yield  # no KeyboardInterrupt is raised in this thread
        return
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    if wakeup != -1:
        yield  # an event loop handles the signal; nothing is raised here
        return
    signal.signal(signal.SIGINT, lambda *_: recording.interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Captures the current stream. Ends the capture on any error."""
    pool: Any = torch.cuda.graph_pool_handle()
    # A garbage collection could free memory or graphs, which a capture forbids.
    collects = gc.isenabled()
    gc.disable()
    _clear_workspaces()
    raised: BaseException | None = None
    try:
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        except Exception as error:
            _repair_torch(graph, pool, device)
            if _is_capture_error(error):  # another thread captures in global mode
                raise InvalidatedCaptureError(_first_line(error)) from error
            raise
        try:
            yield
        except BaseException as error:
            raised = error
        try:
            graph.capture_end()
        except Exception as error:
            _repair_torch(graph, pool, device)
            raise _capture_failure(raised, error) from None
        if raised is not None:
            raise raised
    finally:
        raised = None  # its traceback refers to this frame
        _clear_workspaces()
        if collects:
            gc.enable()


# CUDA's texts for errors 900 and 901. The forbidden operation gets the first, every later operation
# of the invalidated capture the second.
_UNSUPPORTED = "operation not permitted when stream is capturing"
_INVALIDATED = "operation failed due to a previous error during capture"


def _is_capture_error(error: Exception) -> bool:
    return _UNSUPPORTED in str(error) or _INVALIDATED in str(error)


def _capture_failure(raised: BaseException | None, end: Exception) -> BaseException:
    """The error to report when `capture_end` failed with `end`.

    `raised` is the model's error, if any. If the model did not get CUDA's error 900 itself, another
    thread may have invalidated the capture. This is a guess: models may swallow that error, and
    packages always do.
    """
    if isinstance(raised, KeyboardInterrupt):
        return raised
    if _INVALIDATED not in str(end) or _UNSUPPORTED in str(raised):
        return raised or end
    first = raised if isinstance(raised, Exception) else end
    return InvalidatedCaptureError(_first_line(first))


def _clear_workspaces() -> None:
    """Gives the graph a cuBLAS workspace of its own.

    torch keeps one workspace per stream, which other work may use during a replay, or free. Cleared
    before the capture, it is allocated in the graph's pool; cleared afterwards, it stays private.
    """
    with suppress(AttributeError):
        clear_cublas_workspaces()


_invalidated: list[torch.cuda.CUDAGraph] = []


def _repair_torch(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Resets torch's state after an invalidated capture, where `capture_end` raises too early.

    In torch 2.11 (not 2.13) the random generator stays in capture mode until a capture succeeds, so
    a nearly empty capture follows. A new generator state is the last resort: the user's own graphs
    that registered the generator would still read the old one.
    """
    _release_pool(graph, pool, device)
    graph, pool = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.graph_pool_handle()
    try:
        nothing = _buffer(1, device)
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            nothing.zero_()  # torch warns about graphs without nodes
        finally:
            graph.capture_end()
    except Exception:  # this one was invalidated too
        _release_pool(graph, pool, device)
        generator: Any = torch.cuda.default_generators[device.index]
        with suppress(Exception):
            generator.graphsafe_set_state(generator.clone_state())


def _release_pool(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Removes the pool of an invalidated capture from torch's allocator.

    The allocator keeps querying the graph for its captured streams, so the graph is never freed.
    """
    _invalidated.append(graph)
    with suppress(Exception):
        remove_pool(device.index, pool)


@contextmanager
def _graph_use() -> Iterator[list[str]]:
    """Records this thread's own captures and replays, for example those of torch.compile."""
    used: list[str] = []
    thread = threading.get_ident()
    originals = {name: getattr(torch.cuda.CUDAGraph, name) for name in ("capture_begin", "replay")}

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                used.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(torch.cuda.CUDAGraph, name, recorded(name))
    try:
        yield used
    finally:
        for name, original in originals.items():
            setattr(torch.cuda.CUDAGraph, name, original)


def _buffer(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _addresses(buffers: list[torch.Tensor]) -> list[int]:
    return [buffer.data_ptr() for buffer in buffers]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and type(error) in (NotCapturableError, InvalidatedCaptureError, RuntimeError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
