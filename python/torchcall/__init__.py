"""Call PyTorch models from JAX-compiled programs: no host round trip, no Python, no GIL."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from torchcall import _interrupts, _native

if TYPE_CHECKING:
    from torchcall import mliap, models

_native.load_torch_half()
_interrupts.install()

from torchcall._compile import CompileError, compile  # noqa: E402
from torchcall._doctor import doctor  # noqa: E402
from torchcall._threads import set_num_threads  # noqa: E402
from torchcall._wrapper import TorchModuleWrapper, load  # noqa: E402

__all__ = [
    "CompileError",
    "TorchModuleWrapper",
    "compile",
    "doctor",
    "load",
    "mliap",
    "models",
    "set_num_threads",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> ModuleType:
    """Imports `mliap` and `models` when they are first used."""
    if name in ("mliap", "models"):
        return importlib.import_module(f"torchcall.{name}")
    raise AttributeError(f"module 'torchcall' has no attribute {name!r}")
