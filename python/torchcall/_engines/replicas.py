"""One replica of a module for each device that calls use."""

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

from torchcall._engines.isolation import referenced_values

_DEPTH = 4  # of nested containers that are searched for tensors


class Replicas:
    """The module itself on the device that holds its weights, and a copy on each other device.

    A copy is made at the first call on its device. A callable that is not a module has no weights
    to move: it is used on every device.
    """

    def __init__(self, module: Callable[..., Any]) -> None:
        self._module = module
        self._by_device: dict[str, Callable[..., Any]] = {}
        self._replaced: list[tuple[str, Callable[..., Any]]] = []
        self._lock = threading.Lock()
        self.copied = False

    def on(self, device: str) -> Callable[..., Any]:
        """The module on this device, "cpu" or "cuda:<number>"."""
        found = self._by_device.get(device)
        if found is not None:
            return found
        with self._lock:
            if device not in self._by_device:
                self._by_device[device] = self._make(torch.device(device))
            return self._by_device[device]

    def retain_if_replaced(self, device: str, module: Callable[..., Any]) -> None:
        """Retains `module`, whose weights work enqueued on the device reads, if it was replaced.

        torch's allocator reuses memory without waiting for the call's stream. If `release_copies`
        replaced the module during the call, the call must not release the last reference.
        """
        if self._by_device.get(device) is not module:
            with self._lock:
                self._replaced.append((device, module))

    def cpu_module(self) -> Callable[..., Any]:
        """The module with its weights on the CPU, for tracing with fake tensors."""
        return self._moved(torch.device("cpu"))

    def release_copies(self) -> None:
        """Releases the copies, so that the next calls copy the module's present weights."""
        with self._lock:
            self._replaced += self._by_device.items()
            self._by_device.clear()
            with suppress(RuntimeError):  # the next call tries again
                self._release_replaced()

    def tensors_read_on(self, device: str) -> list[torch.Tensor]:
        """The tensors that the callable can read: in attributes, closures, globals and containers.

        A captured CUDA graph reads them at their addresses even after the callable has replaced
        them, so the graph has to retain them.
        """
        with self._lock, suppress(RuntimeError):  # the next call tries again
            self._release_replaced()
        found: dict[int, torch.Tensor] = {}
        for value in referenced_values(self.on(device)):
            parts = value.modules() if isinstance(value, torch.nn.Module) else ()
            for value_or_attributes in (value, *(vars(part) for part in parts)):
                _collect(value_or_attributes, found, _DEPTH)
        return list(found.values())

    def _release_replaced(self) -> None:
        """Releases replaced modules after their devices have finished all work. The lock is held.

        A module whose call is still running is retained by that call (`retain_if_replaced`).

        Raises:
            RuntimeError: a CUDA capture is running, during which a device cannot be synchronised.
        """
        for name in {name for name, _ in self._replaced} - {"cpu"}:
            torch.cuda.synchronize(torch.device(name))
        self._replaced.clear()

    def _make(self, device: torch.device) -> Callable[..., Any]:
        module = self._moved(device)
        self.copied = self.copied or module is not self._module
        if device.type == "cuda" and isinstance(module, torch.nn.Module):
            # The weights are copied on other streams; the calls' streams do not wait for those.
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
