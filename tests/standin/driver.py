"""Plays CUDA's driver over the host's memory: what was called, errors on demand, a latch.

The library answers to the name `libcuda.so.1`: once it is loaded, `dlopen` of that name finds it
for as long as the process lives, provided that no real driver was loaded before.
"""

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torchcall import _native


@dataclass(frozen=True)
class Call:
    """One call of the driver: handles, addresses and flags are integers, outputs are left out."""

    function: str
    arguments: tuple[int, ...]
    result: int
    thread: int  # as threading.get_native_id() names it
    time: int  # nanoseconds, of one clock with the torch stand-in's


def library(name: str) -> Path:
    """The stand-in library of that name, which `make setup` builds.

    Raises:
        FileNotFoundError: in an install that was built without stand-ins.
    """
    path = _native.library_root() / "standin" / f"lib{name}_standin.so"
    if not path.exists():
        raise FileNotFoundError(f"{path} is built with -C cmake.define.TORCHCALL_STANDIN=ON")
    return path


def read_log(copy: Callable[[ctypes.Array[ctypes.c_char] | None, int], int]) -> list[list[str]]:
    """The fields of each line that a library recorded."""
    buffer = ctypes.create_string_buffer(copy(None, 0))
    size = min(copy(buffer, len(buffer)), len(buffer))  # other threads may write meanwhile
    return [line.split("\t") for line in buffer.raw[:size].decode().splitlines()]


_Callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Driver:
    """The process's stand-in driver, as it was left: call `reset()` before a test."""

    def __init__(self) -> None:
        self.path = library("cuda")
        self.library = ctypes.CDLL(str(self.path))
        self._copy_log = self.library.standin_log
        self._copy_log.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._copy_log.restype = ctypes.c_size_t
        self.library.standin_on_launch.argtypes = [ctypes.c_void_p] * 3
        self.library.standin_context.restype = ctypes.c_void_p
        self._callbacks: list[object] = []

    def reset(self) -> None:
        """Forgets everything but the calling threads' contexts."""
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
        """Makes the n-th call of `function` from now on ("*": of any) return `code`, once."""
        self.library.standin_fail(function.encode(), nth, code)

    def on_launch(self, graph: int, run: Callable[[], None]) -> None:
        """Runs `run` when an instance of the graph with that handle is launched."""
        callback = _Callback(lambda _: run())
        self._callbacks.append(callback)
        self.on_launch_native(graph, ctypes.cast(callback, ctypes.c_void_p), None)

    def on_launch_native(
        self, graph: int, run: ctypes.c_void_p | None, argument: int | None
    ) -> None:
        """Calls the C function `run(argument)` at each launch; None: nothing any more."""
        self.library.standin_on_launch(graph, run, argument)

    def place_stream(self, stream: int, device: int) -> None:
        """Says which device a stream belongs to; 0 otherwise."""
        self.library.standin_place_stream(ctypes.c_void_p(stream), device)

    def context(self, device: int = 0) -> int:
        return self.library.standin_context(device)

    def need_context(self, needed: bool) -> None:
        """Whether work fails where no context is current. It does after a reset."""
        self.library.standin_need_context(needed)

    def context_depth(self) -> int:
        """How many contexts the calling thread has pushed and not popped."""
        return self.library.standin_context_depth()

    def live_events(self) -> int:
        return self.library.standin_live_events()

    def live_execs(self) -> int:
        return self.library.standin_live_execs()

    def close_latch(self, patience: float = 30.0) -> None:
        """Keeps what is enqueued from now on from finishing; a wait gives up after `patience` s."""
        self.library.standin_close_latch(ctypes.c_double(patience))

    def open_latch(self) -> None:
        self.library.standin_open_latch()

    @contextmanager
    def latch(self, patience: float = 30.0) -> Iterator[None]:
        """Work stays pending inside the block."""
        self.close_latch(patience)
        try:
            yield
        finally:
            self.open_latch()

    def waiting(self) -> int:
        """How many threads wait for the latch now."""
        return self.library.standin_waiting()

    def await_waiting(self, count: int = 1, seconds: float = 10.0) -> None:
        """Returns once so many threads wait for the latch.

        Raises:
            TimeoutError: if they do not come.
        """
        end = time.monotonic() + seconds
        while self.waiting() < count:
            if time.monotonic() > end:
                raise TimeoutError(f"expected {count} threads waiting, got {self.waiting()}")
            time.sleep(0.001)
