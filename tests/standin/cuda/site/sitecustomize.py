"""Every Python that starts under the CUDA stand-in: its torch and JAX find the devices."""

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def _no_stderr():
    """torch says of each operator that it is replaced."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def _after_torch(torch: ModuleType) -> None:
    with _no_stderr():
        torch.ops.load_library(os.environ["TORCHCALL_STANDIN_OPERATORS"])


def _after_hardware_utils(module: ModuleType) -> None:
    module.has_visible_nvidia_gpu = lambda: True  # it looks for device files


class _After(importlib.abc.MetaPathFinder):
    """Runs something once a module is imported."""

    def __init__(self) -> None:
        self.actions: dict[str, Callable[[ModuleType], None]] = {
            "torch": _after_torch,
            "jax._src.hardware_utils": _after_hardware_utils,
        }

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        del path, target
        action = self.actions.pop(fullname, None)
        if action is None:
            return None
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = exec_module
        return spec


if "libcudart" in os.environ.get("LD_PRELOAD", ""):
    sys.meta_path.insert(0, _After())
