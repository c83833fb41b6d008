"""FFI targets that need no torch, and those of exported programs."""

from functools import cache
from typing import Any

import jax

from torchcall import _bridge

NEIGHBORS = "torchcall_neighbors"
# A process that has imported nothing of torchcall gets XLA's error, which contains this name.
EXPORTED = "torchcall_exported: first load the program's model with torchcall.load(path)"


@cache
def register_neighbors() -> None:
    """Registers the FFI handler of the neighbour list."""
    jax.ffi.register_ffi_target(NEIGHBORS, _bridge.neighbor_handler(), platform="cpu")


@cache
def register_exported() -> None:
    """Registers the FFI handlers of exported programs, which are loaded without a lowering.

    A client that is not running yet registers them when it starts.
    """
    register_neighbors()
    for platform in ("cpu", "CUDA"):
        handlers: Any = _bridge.exported_handlers(platform)
        jax.ffi.register_ffi_target(EXPORTED, handlers, platform=platform)
