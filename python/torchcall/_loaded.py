"""The bridge with the torch half loaded. Imported before anything that calls a model.

Raises:
    ImportError: There is no torch half for the installed torch, or it cannot be loaded.
"""

from torchcall import _bridge, _interrupts, _native

_native.load_torch_half()
_interrupts.install()

__all__ = ["_bridge"]
