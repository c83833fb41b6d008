"""Captures a call into a CUDA graph, with torch's tools. The graph is replayed without Python.

Not yet run on a GPU: tested with torch's CUDA build over played devices.
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
from torch.utils._python_dispatch import _disable_current_modes

from torchcall import _bridge
from torchcall._cuda.observation import observed

# Runs on the side stream before the capture: libraries make handles and workspaces for a stream
# when it uses them first, and a capture forbids that.
_WARM_UPS = 2


class Captured(NamedTuple):
    """A graph that was captured over buffers of its own.

    Attributes:
        graph: the address of the `cudaGraph_t`.
        inputs, outputs: the buffers' addresses.
        owner: what must live until the last replay is through.
    """

    graph: int
    inputs: list[int]
    outputs: list[int]
    owner: object


class NotCaptured(NamedTuple):
    """There is no graph.

    Attributes:
        reason: why.
        again: whether another attempt may succeed.
    """

    reason: str
    again: bool


class NotCapturableError(Exception):
    """Why a call cannot be a replay."""


class VoidCaptureError(Exception):
    """Why a capture was void that may have been voided by somebody else."""


def capture(recording: _bridge.Recording) -> Captured | NotCaptured:
    """Captures a call, or says why there is no graph. Nothing is raised but KeyboardInterrupt.

    First it makes the call itself, and sees whether the model changed what it holds. Then the model
    runs twice on the caller's data, on a stream of its own, before it is captured there.
    The capture forbids only the calling thread what a capture forbids, so other threads may use the
    device meanwhile; one that waits for all of it voids the capture, though. A model that draws
    random numbers is not captured: a replay outside torch would draw the same ones each time.
    """
    try:
        with _disable_current_modes():
            return _capture(recording)
    except Exception as error:
        return NotCaptured(_first_line(error), isinstance(error, VoidCaptureError))


def warn(model: str, reason: str) -> None:
    """Says that calls of a model on a device are not replays."""
    text = f"torchcall: {model}: runs without a CUDA graph: {reason}"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except Warning:  # where warnings are errors: nobody could catch one here
        print(text, file=sys.stderr)


def _capture(recording: _bridge.Recording) -> Captured:
    with observed() as observation:
        reason = recording.call()
    if changed := observation.changed():
        reason = f"it changes its own '{changed}', which a replay would not do again"
    if reason:
        raise NotCapturableError(reason)
    device = torch.device("cuda", recording.ordinal)
    # No stream of torch's: those are shared, and what others enqueue there would be captured.
    stream = torch.cuda.ExternalStream(recording.stream, device)
    with _interrupts_wait(recording), torch.cuda.device(device), torch.cuda.stream(stream):
        with _noting_graphs() as noted, _others_capture(noted):
            inputs = [_buffer(size, device) for size in recording.input_bytes]
            outputs = [_buffer(size, device) for size in recording.output_bytes]
            sources, targets = _addresses(inputs), _addresses(outputs)
            # What used this memory last may not be through with it, and the inputs are copied on
            # the caller's stream.
            stream.synchronize()
            recording.copy_inputs(sources)
            before = torch.cuda.get_rng_state(device)
            try:
                for _ in range(_WARM_UPS):
                    _run(recording, sources, targets, stream.cuda_stream)
            finally:
                stream.synchronize()  # what follows on the caller's stream may use what is made
        if noted:
            raise NotCapturableError("it uses CUDA graphs of its own")
        if not torch.equal(before, torch.cuda.get_rng_state(device)):
            raise NotCapturableError("it draws random numbers")
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with _capturing(graph, device):
            _run(recording, sources, targets, stream.cuda_stream)
        return Captured(graph.raw_cuda_graph(), sources, targets, (graph, inputs, outputs))


@contextmanager
def _others_capture(noted: list[str]) -> Iterator[None]:
    """Where nothing is captured here, what forbids anything is somebody else's capture."""
    try:
        yield
    except RuntimeError as error:
        if not noted and _forbids(error):
            raise VoidCaptureError(_first_line(error)) from error
        raise


def _run(recording: _bridge.Recording, sources: list[int], targets: list[int], stream: int) -> None:
    try:
        recording.run(sources, targets, stream)
    except RuntimeError as error:
        if str(error).startswith("raised KeyboardInterrupt"):
            raise KeyboardInterrupt from error
        raise


@contextmanager
def _interrupts_wait(recording: _bridge.Recording) -> Iterator[None]:
    """Leaves Ctrl-C for when the capture is over.

    In the middle of it, it would be lost on its way through XLA, and might leave a stream captured.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.get_ident() != threading.main_thread().ident or not callable(handler):
        yield  # Python raises nothing here
        return
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    if wakeup != -1:
        yield  # an event loop's: it is told at once, and nothing is raised here
        return
    signal.signal(signal.SIGINT, lambda *_: recording.interrupt())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Ends the capture whatever happens in it: a stream must not be left in that state."""
    pool: Any = torch.cuda.graph_pool_handle()
    # A collection might free memory or graphs, which a capture forbids.
    collects = gc.isenabled()
    gc.disable()
    _clear_workspaces()
    raised: BaseException | None = None
    try:
        try:
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        except Exception as error:
            _mend(graph, pool, device)
            if _forbids(error):  # so does another's capture of the whole process
                raise VoidCaptureError(_first_line(error)) from error
            raise
        try:
            yield
        except BaseException as error:
            raised = error
        try:
            graph.capture_end()
        except Exception as error:
            _mend(graph, pool, device)
            raise _void_capture(raised, error) from None
        if raised is not None:
            raise raised
    finally:
        raised = None  # it holds this frame
        _clear_workspaces()
        if collects:
            gc.enable()


# CUDA's words for 900 and 901. The first is for who does what captures forbid, the second for
# everybody who goes on with the capture afterwards.
_UNSUPPORTED = "operation not permitted when stream is capturing"
_VOID = "operation failed due to a previous error during capture"


def _forbids(error: Exception) -> bool:
    return _UNSUPPORTED in str(error) or _VOID in str(error)


def _void_capture(raised: BaseException | None, end: Exception) -> BaseException:
    """What to say of a capture in which the model raised, or did not, and which could not end.

    Where the model was not told that it did something forbidden, it may have been another thread.
    Nothing tells for sure: a model may hide what it was told, and packages hide everything.
    """
    if isinstance(raised, KeyboardInterrupt):
        return raised
    if _VOID not in str(end) or _UNSUPPORTED in str(raised):
        return raised or end
    first = raised if isinstance(raised, Exception) else end
    return VoidCaptureError(_first_line(first))


def _clear_workspaces() -> None:
    """Makes cuBLAS's workspace for the captured stream the graph's own.

    torch keeps one per stream, which others may use at the time of a replay, or free. Without one
    the capture makes another, in the graph's memory; afterwards nobody else gets that one.
    """
    with suppress(AttributeError):
        torch._C._cuda_clearCublasWorkspaces()


_void: list[torch.cuda.CUDAGraph] = []


def _mend(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Undoes what a void capture leaves behind in torch, which gives up half-way in `capture_end`.

    Its generator of random numbers believes that it is being captured (in torch 2.11, not in 2.13),
    until a capture ends well: so one follows in which next to nothing happens. A fresh state would
    do too, but graphs of the user's that registered the generator would go on reading the old one.
    """
    _leave(graph, pool, device)
    graph, pool = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.graph_pool_handle()
    try:
        nothing = _buffer(1, device)
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            nothing.zero_()  # torch warns of graphs without a node
        finally:
            graph.capture_end()
    except Exception:  # somebody voided this one too
        _leave(graph, pool, device)
        generator: Any = torch.cuda.default_generators[device.index]
        with suppress(Exception):
            generator.graphsafe_set_state(generator.clone_state())


def _leave(graph: torch.cuda.CUDAGraph, pool: Any, device: torch.device) -> None:
    """Takes the pool of a void capture from torch's allocator.

    That goes on asking the graph which streams it captures, so the graph must stay.
    """
    _void.append(graph)
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)


@contextmanager
def _noting_graphs() -> Iterator[list[str]]:
    """Notes whether this thread captures or replays graphs, as what torch.compile makes may do."""
    noted: list[str] = []
    thread = threading.get_ident()
    originals = {name: getattr(torch.cuda.CUDAGraph, name) for name in ("capture_begin", "replay")}

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                noted.append(name)
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(torch.cuda.CUDAGraph, name, noting(name))
    try:
        yield noted
    finally:
        for name, original in originals.items():
            setattr(torch.cuda.CUDAGraph, name, original)


def _buffer(size: int, device: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _addresses(buffers: list[torch.Tensor]) -> list[int]:
    return [buffer.data_ptr() for buffer in buffers]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and type(error) in (NotCapturableError, VoidCaptureError, RuntimeError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
