"""Simulates "cuda:0" and "cuda:1" in a CPU build of torch, on host memory.

Operators run on the CPU and are logged with the current device and stream. This changes the process
permanently, so it needs a process of its own: `models.run_python` for a program, `run_tests` for
test files (named so that pytest does not collect them by itself).

Python can use tensors and modules on "cuda:i" and torch's device-neutral interface
(`torch.accelerator`, `torch.Stream`, `torch.Event`). `torch.cuda` stays unavailable, except for
what `torch_graphs.simulated_cuda` provides.

Work is complete when a call returns, in call order. A missing wait between streams therefore still
gives correct results; only the log shows it. Random numbers come from the CPU's generator.
"""

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import torch
from standin.build import build
from standin.driver import read_log
from torch import Tensor
from torch.utils import dlpack


@dataclass(frozen=True)
class Entry:
    """One log entry of a device.

    kind: "op" (an operator, by its full name), "sync" (the host waited for a stream, a device, an
    event, or in the named operator), "alloc" and "free" (name: bytes; stream: the one current at
    allocation), "device" and "stream" (the current one changed), "event" (record, wait,
    record_stream), "replay" (an operator of a replayed graph), "error" (that operator raised).
    """

    kind: str
    name: str
    device: int
    stream: int
    thread: int  # threading.get_native_id()
    time: int  # nanoseconds; the same clock as driver.Call


class TorchDevice:
    """The process's simulated devices. They are global state: call `reset()` before a test."""

    def __init__(self) -> None:
        self.path = build("torch_cuda")
        self.library = ctypes.CDLL(str(self.path))
        self._copy_log = self.library.standin_device_log
        self._copy_log.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self._copy_log.restype = ctypes.c_size_t
        self.library.standin_device_live_bytes.restype = ctypes.c_size_t
        self.library.standin_device_stream.restype = ctypes.c_int64
        # Called before the first use of "cuda"; nothing to initialise here.
        torch.cuda._lazy_init = lambda: None

    def reset(self) -> None:
        """Clears the log, injected failures and limits; tensors and current streams remain."""
        self.library.standin_device_reset()

    def log(self, *kinds: str) -> list[Entry]:
        """The entries since the last reset, in order."""
        entries = []
        for when, thread, kind, name, device, stream in read_log(self._copy_log):
            if not kinds or kind in kinds:
                entry = Entry(kind, name, int(device), int(stream), int(thread), int(when))
                entries.append(entry)
        return entries

    def names(self, *kinds: str) -> list[str]:
        return [entry.name for entry in self.log(*kinds)]

    def fail(self, operator: str, nth: int = 1, message: str = "CUDA error: unknown error") -> None:
        """Makes the n-th next call of `operator` ("*": any) raise, once."""
        self.library.standin_device_fail(operator.encode(), nth, message.encode())

    def live_bytes(self, device: int = 0) -> int:
        """The bytes that torch has allocated on the device, without borrowed memory."""
        return self.library.standin_device_live_bytes(device)

    def limit(self, size: int, device: int = 0) -> None:
        """Makes allocations beyond `size` live bytes raise torch.OutOfMemoryError."""
        self.library.standin_device_limit(device, ctypes.c_size_t(size))

    def current_device(self) -> int:
        """The calling thread's current device."""
        return self.library.standin_device_current()

    def current_stream(self, device: int = 0) -> int:
        """The id of the calling thread's current stream; 0 is the default stream."""
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
    """A device tensor on a CPU tensor's memory, as from `at::from_blob`."""
    capsule = tensor.__dlpack__()
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    header = _Header.from_address(pointer(capsule, b"dltensor"))
    header.device_type, header.device_id = 2, device  # kDLCUDA
    return dlpack.from_dlpack(capsule)


def run_tests(*files: Path) -> dict[str, list[str]]:
    """Runs test files in one new process, which may load the simulation.

    Returns:
        The failures of each file, by its name. Files without tests are missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *map(str, files)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        output = f"{done.stdout}\n{done.stderr}"
        assert report.exists(), output  # the process crashed
        cases = list(ElementTree.parse(report).iter("testcase"))
    failures: dict[str, list[str]] = {}
    for case in cases:
        # A file that cannot be imported is a case without a class name.
        module = case.get("classname") or case.get("name", "")
        texts = failures.setdefault(module.rpartition(".")[2] + ".py", [])
        texts += [part.text or "" for part in case if part.tag in ("failure", "error")]
    assert done.returncode == 0 or any(failures.values()), output
    return failures
