"""A module per device that it is called on."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch


class Replicas:
    """The module itself on the device where its weights are, a copy of it on any other.

    A copy is made when a call on its device wants it first. What is no module has no weights that
    could be moved, and serves every device as it is.
    """

    def __init__(self, module: Callable[..., Any]) -> None:
        self._module = module
        self._on: dict[str, Callable[..., Any]] = {}
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

    def to_follow(self) -> Callable[..., Any]:
        """The module with its weights on the CPU, where fake tensors are; no call runs it."""
        return self._moved(torch.device("cpu"))

    def forget(self) -> None:
        """Lets go of the copies: weights have changed."""
        with self._lock:
            for name in self._on:
                device = torch.device(name)
                if device.type == "cuda":  # calls that use them may be under way
                    torch.cuda.synchronize(device)
            self._on.clear()

    def tensors(self, device: str) -> list[torch.Tensor]:
        """All tensors that the module on this device refers to by attributes.

        A captured graph reads them where they are, also after the module has replaced them.
        """
        module = self.on(device)
        if not isinstance(module, torch.nn.Module):
            return []
        values = [value for part in module.modules() for value in vars(part).values()]
        return [
            *module.parameters(),
            *module.buffers(),
            *(value for value in values if isinstance(value, torch.Tensor)),
        ]

    def _make(self, device: torch.device) -> Callable[..., Any]:
        module = self._moved(device)
        self.copied = self.copied or module is not self._module
        if device.type == "cuda" and isinstance(module, torch.nn.Module):
            # Weights travel on other streams than the calls', which would not wait for them.
            torch.cuda.synchronize(device)
        return module

    def _moved(self, device: torch.device) -> Callable[..., Any]:
        module = self._module
        if not isinstance(module, torch.nn.Module):
            return module
        if all(weight.device == device for weight in (*module.parameters(), *module.buffers())):
            return module
        return copy.deepcopy(module).to(device)
