"""One copy of a module for each device that calls use."""

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from torchcall._engines.isolation import behind

_DEPTH = 4  # of containers in containers: a table of lists of tensors, in a module's attributes


class Replicas:
    """The module itself on the device where its weights are, a copy of it on any other.

    A copy is made at the first call on its device. A callable that is not a module has no weights
    to move and serves every device as it is.
    """

    def __init__(self, module: Callable[..., Any]) -> None:
        self._module = module
        self._on: dict[str, Callable[..., Any]] = {}
        self._old: list[tuple[str, Callable[..., Any]]] = []
        self._lock = threading.Lock()
        self.copied = False

    def on(self, device: str) -> Callable[..., Any]:
        """The module on this device, "cpu" or "cuda:<number>"."""
        found = self._on.get(device)
        if found is not None:
            return found
        with self._lock:
            if device not in self._on:
                self._on[device] = self._make(torch.device(device))
            return self._on[device]

    def used(self, device: str, module: Callable[..., Any]) -> None:
        """Takes a module back from a call that has enqueued work which reads it.

        Its memory does not wait for the call's stream: if the module is no longer the device's,
        the call must not release it.
        """
        if self._on.get(device) is not module:
            with self._lock:
                self._old.append((device, module))

    def to_follow(self) -> Callable[..., Any]:
        """The module with its weights on the CPU, for tracing with fake tensors."""
        return self._moved(torch.device("cpu"))

    def forget(self) -> None:
        """Releases the copies, because the weights have changed."""
        with self._lock:
            self._old += self._on.items()
            self._on.clear()
            with suppress(RuntimeError):  # tried again later
                self._let_go()

    def tensors(self, device: str) -> list[torch.Tensor]:
        """The tensors behind the callable there: in attributes, closures, globals, containers.

        A captured graph reads them at their addresses, even after they have been replaced.
        """
        with self._lock, suppress(RuntimeError):  # tried again later
            self._let_go()
        found: dict[int, torch.Tensor] = {}
        for value in behind(self.on(device)):
            parts = value.modules() if isinstance(value, torch.nn.Module) else ()
            for held in (value, *(vars(part) for part in parts)):
                _collect(held, found, _DEPTH)
        return list(found.values())

    def _let_go(self) -> None:
        """Releases what was replaced, once its devices have finished with it. The lock is held.

        Modules in use are returned by their calls. No capture may be running.
        """
        for name in {name for name, _ in self._old} - {"cpu"}:
            torch.cuda.synchronize(torch.device(name))
        self._old.clear()

    def _make(self, device: torch.device) -> Callable[..., Any]:
        module = self._moved(device)
        self.copied = self.copied or module is not self._module
        if device.type == "cuda" and isinstance(module, torch.nn.Module):
            # Weights are copied on other streams, for which the calls' streams would not wait.
            torch.cuda.synchronize(device)
        return module

    def _moved(self, device: torch.device) -> Callable[..., Any]:
        module = self._module
        if not isinstance(module, torch.nn.Module):
            return module
        if all(weight.device == device for weight in (*module.parameters(), *module.buffers())):
            return module
        return copy.deepcopy(module).to(device)


def _collect(value: Any, found: dict[int, torch.Tensor], depth: int) -> None:
    if isinstance(value, torch.Tensor):
        found[id(value)] = value
    elif depth > 0 and isinstance(value, dict | list | tuple | set):
        for entry in value.values() if isinstance(value, dict) else value:
            _collect(entry, found, depth - 1)
