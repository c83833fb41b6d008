"""Makes "cuda:0" and "cuda:1" usable in a CPU build of torch, over the host's memory.

Operators run on the CPU and are recorded with the device and stream that were current. This
changes a process for good, so it belongs into a process of its own: a program that
`models.run_python` runs, or a file of tests that `run_tests` runs (under a name that pytest does
not find by itself).

`torch.cuda` stays unavailable, but for what `torch_graphs.pretended_cuda` puts there. What Python
can use is tensors and modules on "cuda:i", and torch's device-neutral interface:
`torch.accelerator`, `torch.Stream`, `torch.Event`.

Work is done before a call returns, in the order of the calls: a program that lacks a wait between
streams gives right results here, and only the log shows it. Random numbers are the CPU's.
"""

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from standin.driver import library, read_log
from torch import Tensor
from torch.utils import dlpack


@dataclass(frozen=True)
class Entry:
    """One thing that happened on a device.

    kind: "op" (an operator, by its full name), "sync" (the host waited: for a stream, a device, an
    event, or in the operator named), "alloc" and "free" (name: bytes; the stream current when they
    were allocated), "device" and "stream" (another one became current), "event" (record, wait,
    record_stream), "replay" (an operator that a graph runs again), "error" (it raised there).
    """

    kind: str
    name: str
    device: int
    stream: int
    thread: int  # as threading.get_native_id() names it
    time: int  # nanoseconds, of one clock with the driver stand-in's


class TorchDevice:
    """The process's stand-in devices, as they were left: call `reset()` before a test."""

    def __init__(self) -> None:
        self.path = library("torch_cuda")
        self.library = ctypes.CDLL(str(self.path))
        self._copy_log = self.library.standin_device_log
        self._copy_log.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._copy_log.restype = ctypes.c_size_t
        self.library.standin_device_live_bytes.restype = ctypes.c_size_t
        self.library.standin_device_stream.restype = ctypes.c_int64
        # Python asks this before it touches "cuda" for the first time. Nothing needs initializing.
        torch.cuda._lazy_init = lambda: None

    def reset(self) -> None:
        """Forgets the log, planned failures and limits; tensors and current streams stay."""
        self.library.standin_device_reset()

    def log(self, *kinds: str) -> list[Entry]:
        """What happened since the last reset, in order."""
        entries = []
        for when, thread, kind, name, device, stream in read_log(self._copy_log):
            if not kinds or kind in kinds:
                entry = Entry(kind, name, int(device), int(stream), int(thread), int(when))
                entries.append(entry)
        return entries

    def names(self, *kinds: str) -> list[str]:
        return [entry.name for entry in self.log(*kinds)]

    def fail(self, operator: str, nth: int = 1, message: str = "CUDA error: unknown error") -> None:
        """Makes the n-th call of `operator` from now on ("*": of any) raise, once."""
        self.library.standin_device_fail(operator.encode(), nth, message.encode())

    def live_bytes(self, device: int = 0) -> int:
        """Bytes that torch's tensors own on the device; borrowed memory does not count."""
        return self.library.standin_device_live_bytes(device)

    def limit(self, size: int, device: int = 0) -> None:
        """Makes allocations beyond so many live bytes raise torch.OutOfMemoryError."""
        self.library.standin_device_limit(device, ctypes.c_size_t(size))

    def current_device(self) -> int:
        """Of the calling thread."""
        return self.library.standin_device_current()

    def current_stream(self, device: int = 0) -> int:
        """Of the calling thread: the id, 0 for the default stream."""
        return self.library.standin_device_stream(device)

    def set_current_device(self, device: int) -> None:
        self.library.standin_device_set_current(device)

    def is_capturing(self) -> bool:
        """Whether the current stream of the calling thread is captured."""
        return bool(self.library.standin_graph_is_capturing())

    @contextmanager
    def stream(self, stream: int, device: int = 0) -> Iterator[None]:
        """Makes the stream current on the calling thread."""
        before = self.current_stream(device)
        self.library.standin_device_set_stream(device, ctypes.c_int64(stream))
        try:
            yield
        finally:
            self.library.standin_device_set_stream(device, ctypes.c_int64(before))


class _Header(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
    )


def borrowed(tensor: Tensor, device: int = 0) -> Tensor:
    """A tensor on the device that shares a CPU tensor's memory, as `at::from_blob` makes it."""
    capsule = tensor.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    header = _Header.from_address(pointer(capsule, b"dltensor"))
    header.device_type, header.device_id = 2, device  # kDLCUDA
    return dlpack.from_dlpack(capsule)


def run_tests(*files: Path) -> None:
    """Runs files of tests in a process of its own, which may load the stand-in."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
