"""Captures a call into a CUDA graph, with torch's tools. The graph is replayed without Python.

Not yet run on a GPU: written from torch's sources, tested over stand-ins.
"""

import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from torchcall import _bridge
from torchcall._observation import observed

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


class NotCapturableError(Exception):
    """Why a call cannot be a replay."""


def capture(recording: _bridge.Recording) -> Captured | str:
    """Captures a call, or says why that is impossible. Nothing is raised.

    First it makes the call itself, and sees whether the model changed what it holds. Then the model
    runs twice on the caller's data, on a stream of its own, before it is captured there.
    The capture forbids only the calling thread what a capture forbids, so other threads may use the
    device meanwhile. A model that draws random numbers is not captured: a replay outside torch
    would draw the same ones each time.
    """
    try:
        with _disable_current_modes():
            return _capture(recording)
    except Exception as error:
        return _first_line(error)


def warn(model: str, reason: str) -> None:
    """Says that calls of a model on a device are not replays."""
    text = f"torchcall: {model}: runs without a CUDA graph: {reason}"
    try:
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    except Warning:  # where warnings are errors: nobody could catch one here
        print(text, file=sys.stderr)


def _capture(recording: _bridge.Recording) -> Captured:
    device = torch.device("cuda", recording.ordinal)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        stream = torch.cuda.current_stream(device)
        with observed() as observation:
            reason = recording.call()
        if changed := observation.changed():
            reason = f"it changes its own '{changed}', which a replay would not do again"
        if reason:
            raise NotCapturableError(reason)
        inputs = [_buffer(size, device) for size in recording.input_bytes]
        outputs = [_buffer(size, device) for size in recording.output_bytes]
        sources, targets = _addresses(inputs), _addresses(outputs)
        # torch's streams are shared: what used this memory last may not be through with it, and
        # the inputs are copied on the caller's stream.
        stream.synchronize()
        recording.copy_inputs(sources)
        before = torch.cuda.get_rng_state(device)
        try:
            with _noting_graphs() as noted:
                for _ in range(_WARM_UPS):
                    recording.run(sources, targets, stream.cuda_stream)
        finally:
            stream.synchronize()  # what follows on the caller's stream may use what was made here
        if noted:
            raise NotCapturableError("it uses CUDA graphs of its own")
        if not torch.equal(before, torch.cuda.get_rng_state(device)):
            raise NotCapturableError("it draws random numbers")
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with _capturing(graph, device):
            recording.run(sources, targets, stream.cuda_stream)
        return Captured(graph.raw_cuda_graph(), sources, targets, (graph, inputs, outputs))


@contextmanager
def _capturing(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """Ends the capture whatever happens in it: a stream must not be left in that state."""
    pool: Any = torch.cuda.graph_pool_handle()
    # A collection might free memory or graphs, which a capture forbids.
    collects = gc.isenabled()
    gc.disable()
    _clear_workspaces()
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(Exception):  # it says once more that the capture is void
                graph.capture_end()
            raise
        graph.capture_end()
    except BaseException:
        _mend(graph, pool, device)
        raise
    finally:
        _clear_workspaces()
        if collects:
            gc.enable()


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

    Its allocator goes on asking the graph which streams it captures, so the graph must stay; its
    generator of random numbers believes that it is being captured, until it gets a fresh state.
    """
    _void.append(graph)
    generator: Any = torch.cuda.default_generators[device.index]
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with suppress(Exception):
        generator.graphsafe_set_state(generator.clone_state())


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
    if lines and type(error) in (NotCapturableError, RuntimeError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
