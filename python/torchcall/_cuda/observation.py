"""Whether calls of Python modules change what the modules hold, which a replay would not repeat."""

import threading
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch

_PLAIN = (bool, int, float, complex, str, bytes, tuple, torch.Size)


class Observation:
    """The modules that one thread calls, as they were before."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._before: dict[int, tuple[torch.nn.Module, list[tuple[str, object, int]]]] = {}

    def see(self, module: object) -> None:
        """Notes what a module holds; it is about to be called."""
        if not isinstance(module, torch.nn.Module) or threading.get_ident() != self._thread:
            return
        if id(module) not in self._before:
            self._before[id(module)] = (module, _held(module))

    def changed(self) -> str | None:
        """The name of an attribute that is another one now, or of a tensor that was written to."""
        for module, before in self._before.values():
            now = _held(module)
            for (name, old, old_mark), (_, new, mark) in zip(before, now, strict=False):
                same = old is new or (isinstance(old, _PLAIN) and bool(old == new))
                if not same or old_mark != mark:
                    return name
            if len(before) != len(now):
                return "attributes"
        return None


current: Observation | None = None


@contextmanager
def observed() -> Iterator[Observation]:
    """Observes the modules that this thread calls through torchcall; one thread at a time may."""
    global current
    current = Observation()
    try:
        yield current
    finally:
        current = None


def _held(module: torch.nn.Module) -> list[tuple[str, object, int]]:
    """Name, value, and a mark that changes when the value is changed in place."""
    held = []
    for path, part in module.named_modules():
        own = vars(part)
        for holder in (own, own["_parameters"], own["_buffers"]):
            for name, value in holder.items():
                held.append((f"{path}.{name}" if path else name, value, _mark(value)))
    return held


def _mark(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return 0 if value.is_inference() else value._version
    return len(value) if isinstance(value, Sized) and not isinstance(value, _PLAIN) else 0
