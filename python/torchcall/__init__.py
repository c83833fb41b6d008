"""Call PyTorch models from JAX-compiled programs: no host round trip, no Python, no GIL."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchcall import mliap, models
    from torchcall._call.exported import export_checks
    from torchcall._compile import CompileError, compile
    from torchcall._doctor import doctor
    from torchcall._functional import FunctionalModule, functional
    from torchcall._threads import set_num_threads
    from torchcall._wrapper import TorchModuleWrapper, load

__all__ = [
    "CompileError",
    "FunctionalModule",
    "TorchModuleWrapper",
    "compile",
    "doctor",
    "export_checks",
    "functional",
    "load",
    "mliap",
    "models",
    "set_num_threads",
]
__version__ = "0.1.0"

_HOMES = {
    "CompileError": "_compile",
    "FunctionalModule": "_functional",
    "TorchModuleWrapper": "_wrapper",
    "compile": "_compile",
    "doctor": "_doctor",
    "export_checks": "_call.exported",
    "functional": "_functional",
    "load": "_wrapper",
    "set_num_threads": "_threads",
}


def __getattr__(name: str) -> Any:
    """Imports jax, torch and the native libraries when a name is first used.

    So the command line answers at once.
    """
    if name not in __all__:
        raise AttributeError(f"module 'torchcall' has no attribute {name!r}")
    if name != "doctor":  # which reports why it cannot be loaded
        importlib.import_module("torchcall._loaded")
    if name not in _HOMES:
        return importlib.import_module(f"torchcall.{name}")
    value = getattr(importlib.import_module(f"torchcall.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
