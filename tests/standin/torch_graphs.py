"""Simulates the part of `torch.cuda` that captures CUDA graphs.

A capture records operators; a launch runs them again on the same memory. With the simulated driver,
`cuGraphLaunch` of an instance of `raw_cuda_graph()` is such a launch. A capture covers one stream:
work on streams forked from it with events runs and is not captured.
"""

import contextlib
import ctypes
import itertools
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from standin.driver import Driver
from standin.torch_device import TorchDevice

_CUDA = 1  # c10::DeviceType


class Stream:
    """A stream whose handle is its id, as for external streams in torch.

    As in torch, new streams come from a pool of 32 per device, handed out round-robin.
    """

    _taken: ClassVar[defaultdict[int, itertools.count]] = defaultdict(itertools.count)

    def __init__(self, device: Any = None, handle: int | None = None, **_: Any) -> None:
        self.device = torch.device("cuda", _index(device))
        self.cuda_stream = self._pooled() if handle is None else handle

    def _pooled(self) -> int:
        index = self.device.index
        return 0x5000 + 0x1000 * index + 0x10 * (next(self._taken[index]) % 32)

    def synchronize(self) -> None:
        torch.Stream(
            stream_id=self.cuda_stream, device_index=self.device.index, device_type=_CUDA
        ).synchronize()


class Generator:
    """The part of a device's random generator that captures use."""

    def __init__(self) -> None:
        self.capturing = False
        self.states_set = 0

    def clone_state(self) -> "Generator":
        return Generator()

    def graphsafe_set_state(self, state: "Generator") -> None:
        self.capturing = state.capturing
        self.states_set += 1


class Graph:
    """Replaces torch.cuda.CUDAGraph."""

    device: TorchDevice
    driver: Driver | None

    def __init__(self, keep_graph: bool = False) -> None:
        self.keep_graph = keep_graph
        self._handle: int | None = None
        self._complete = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        del pool  # every capture has its own memory
        assert self._handle is None, "captured twice"
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        device = self.device.current_device()
        stream = self.device.current_stream(device)
        if stream == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self._generator: Any = torch.cuda.default_generators[device]
        self._generator.capturing = True
        begin = self.device.library.standin_graph_begin
        begin.restype, begin.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_int64]
        self._handle = begin(device, stream)

    def capture_end(self) -> None:
        if self.device.library.standin_graph_end(ctypes.c_void_p(self._handle)) < 0:
            raise RuntimeError(
                "CUDA error: operation failed due to a previous error during capture"
            )
        self._generator.capturing = False
        self._complete = True
        if self.driver is not None:
            launch = ctypes.cast(self.device.library.standin_graph_launch, ctypes.c_void_p)
            self.driver.on_launch_native(self.raw_cuda_graph(), launch, self._handle)

    def raw_cuda_graph(self) -> int:
        if not self._complete or self._handle is None:
            raise RuntimeError("You cannot access the raw cudaGraph_t until capture_end()")
        return self._handle

    def replay(self) -> None:
        self.device.library.standin_graph_launch(ctypes.c_void_p(self.raw_cuda_graph()))

    def reset(self) -> None:
        if self._handle is not None:
            if self.driver is not None:
                released = ctypes.cast(self.device.library.standin_graph_released, ctypes.c_void_p)
                self.driver.on_launch_native(self._handle, released, None)
            self.device.library.standin_graph_end(ctypes.c_void_p(self._handle))
            self.device.library.standin_graph_release(ctypes.c_void_p(self._handle))
        self._handle, self._complete = None, False

    def __del__(self) -> None:
        with contextlib.suppress(TypeError, AttributeError):  # at interpreter exit
            self.reset()


def _index(device: Any) -> int:
    if device is None:
        return Graph.device.current_device()
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return Graph.device.current_device() if index is None else index


@contextmanager
def _on_device(device: Any) -> Iterator[None]:
    before = Graph.device.current_device()
    Graph.device.set_current_device(_index(device))
    try:
        yield
    finally:
        Graph.device.set_current_device(before)


@contextmanager
def _on_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    with _on_device(stream.device), Graph.device.stream(stream.cuda_stream, stream.device.index):
        yield


@contextmanager
def simulated_cuda(device: TorchDevice, driver: Driver | None = None) -> Iterator[None]:
    """Makes the parts of `torch.cuda` that graph captures need available inside the block.

    The generator state is the CPU's, as random numbers on the devices come from there.
    """
    Graph.device, Graph.driver = device, driver
    names: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": device.current_device,
        "set_device": lambda new: device.set_current_device(_index(new)),
        "device": _on_device,
        "Stream": Stream,
        "ExternalStream": lambda handle, device=None: Stream(device, handle),
        "stream": _on_stream,
        "synchronize": lambda device=None: torch.accelerator.synchronize(_index(device)),
        "is_current_stream_capturing": lambda: device.is_capturing(),
        "get_rng_state": lambda _=None: torch.get_rng_state(),
        "default_generators": (Generator(), Generator()),
        "CUDAGraph": Graph,
        "graph_pool_handle": lambda: (0, 0),
    }
    with ExitStack() as stack:
        for name, value in names.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        yield
