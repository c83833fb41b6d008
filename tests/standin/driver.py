"""Simulates the CUDA driver on host memory, with a call log, injected errors and a latch.

Once the library is loaded, `dlopen("libcuda.so.1")` finds it until the process exits, provided that
no real driver was loaded before.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from standin.build import build


@dataclass(frozen=True)
class Call:
    """One call of the driver. Handles, addresses and flags are integers; outputs are omitted."""

    function: str
    arguments: tuple[int, ...]
    result: int
    thread: int  # threading.get_native_id()
    time: int  # nanoseconds; the same clock as torch_device.Entry


def read_log(copy: Callable[[ctypes.Array[ctypes.c_char] | None, int], int]) -> list[list[str]]:
    """The tab-separated fields of each line of a library's log."""
    buffer = ctypes.create_string_buffer(copy(None, 0))
    size = min(copy(buffer, len(buffer)), len(buffer))  # other threads may write meanwhile
    return [line.split("\t") for line in buffer.raw[:size].decode().splitlines()]


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Driver:
    """The process's simulated driver. It is global state: call `reset()` before a test."""

    def __init__(self) -> None:
        self.path = build("cuda")
        self.library = ctypes.CDLL(str(self.path))
        self._copy_log = self.library.standin_log
        self._copy_log.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._copy_log.restype = ctypes.c_size_t
        self.library.standin_on_launch.argtypes = [ctypes.c_void_p] * 3
        self.library.standin_context.restype = ctypes.c_void_p
        self._callbacks: list[object] = []

    def reset(self) -> None:
        """Clears everything except the calling thread's contexts."""
        self.library.standin_reset()
        self._callbacks.clear()

    def log(self, *functions: str) -> list[Call]:
        """The calls since the last reset, in the order in which they returned."""
        calls = []
        for when, thread, function, arguments, result in read_log(self._copy_log):
            if functions and function not in functions:
                continue
            numbers = tuple(int(number, 16) for number in arguments.split())
            calls.append(Call(function, numbers, int(result), int(thread), int(when)))
        return calls

    def names(self) -> list[str]:
        return [call.function for call in self.log()]

    def fail(self, function: str, nth: int = 1, code: int = 999) -> None:
        """Makes the n-th next call of `function` ("*": any) return `code`, once."""
        self.library.standin_fail(function.encode(), nth, code)

    def on_launch(self, graph: int, run: Callable[[], None]) -> None:
        """Runs `run` at each launch of an instance of the graph."""
        callback = _Callback(lambda _: run())
        self._callbacks.append(callback)
        self.on_launch_native(graph, ctypes.cast(callback, ctypes.c_void_p), None)

    def on_launch_native(
        self, graph: int, run: ctypes.c_void_p | None, argument: int | None
    ) -> None:
        """Calls the C function `run(argument)` at each launch; None removes the callback."""
        self.library.standin_on_launch(graph, run, argument)

    def place_stream(self, stream: int, device: int) -> None:
        """Assigns a stream to a device; without it, streams belong to device 0."""
        self.library.standin_place_stream(ctypes.c_void_p(stream), device)

    def context(self, device: int = 0) -> int:
        return self.library.standin_context(device)

    def need_context(self, needed: bool) -> None:
        """Whether calls fail without a current context. After a reset they do."""
        self.library.standin_need_context(needed)

    def context_depth(self) -> int:
        """The number of contexts that the calling thread has pushed and not popped."""
        return self.library.standin_context_depth()

    def live_events(self) -> int:
        return self.library.standin_live_events()

    def live_execs(self) -> int:
        return self.library.standin_live_execs()

    def close_latch(self, timeout: float = 30.0) -> None:
        """Keeps work enqueued from now on pending. Waits for it fail after `timeout` seconds."""
        self.library.standin_close_latch(ctypes.c_double(timeout))

    def open_latch(self) -> None:
        self.library.standin_open_latch()

    @contextmanager
    def latch(self, timeout: float = 30.0) -> Iterator[None]:
        """Work stays pending inside the block."""
        self.close_latch(timeout)
        try:
            yield
        finally:
            self.open_latch()

    def waiting(self) -> int:
        """The number of threads that wait for the latch."""
        return self.library.standin_waiting()

    def await_waiting(self, count: int = 1, seconds: float = 10.0) -> None:
        """Blocks until `count` threads wait for the latch.

        Raises:
            TimeoutError: after `seconds`.
        """
        end = time.monotonic() + seconds
        while self.waiting() < count:
            if time.monotonic() > end:
                raise TimeoutError(f"expected {count} threads waiting, got {self.waiting()}")
            time.sleep(0.001)
