"""Detects Python modules whose calls change their own state: a replay would not repeat that."""

import threading
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch

from torchcall._undocumented.of_torch import BUFFERS, PARAMETERS, write_count

_PLAIN = (bool, int, float, complex, str, bytes, tuple, torch.Size)


class Observation:
    """The state of the modules that one thread calls, before their first call."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._before: dict[int, tuple[torch.nn.Module, list[tuple[str, object, int]]]] = {}

    def see(self, module: object) -> None:
        """Records a module's state before it is called."""
        if not isinstance(module, torch.nn.Module) or threading.get_ident() != self._thread:
            return
        if id(module) not in self._before:
            self._before[id(module)] = (module, _state(module))

    def changed(self) -> str | None:
        """The name of a reassigned attribute or of a tensor written in place, if any."""
        for module, before in self._before.values():
            now = _state(module)
            for (name, old, old_version), (_, new, version) in zip(before, now, strict=False):
                same = old is new or (isinstance(old, _PLAIN) and bool(old == new))
                if not same or old_version != version:
                    return name
            if len(before) != len(now):
                return "attributes"
        return None


current: Observation | None = None


@contextmanager
def observed() -> Iterator[Observation]:
    """Observes the modules that this thread calls through torchcall. One thread at a time."""
    global current
    current = Observation()
    try:
        yield current
    finally:
        current = None


def _state(module: torch.nn.Module) -> list[tuple[str, object, int]]:
    """Name, value, and a version that changes when the value is modified in place."""
    state = []
    for path, part in module.named_modules():
        own = vars(part)
        for holder in (own, own[PARAMETERS], own[BUFFERS]):
            for name, value in holder.items():
                state.append((f"{path}.{name}" if path else name, value, _version(value)))
    return state


def _version(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return 0 if value.is_inference() else write_count(value)
    return len(value) if isinstance(value, Sized) and not isinstance(value, _PLAIN) else 0
