"""The bridge with the torch half loaded. Imported before anything that calls a model.

Raises:
    ImportError: JAX or torch is missing or too old, there is no torch half for the installed torch,
        or a library cannot be loaded.
"""

from torchcall import _requirements

_requirements.check()
_requirements.check_bridge()

try:
    from torchcall import _bridge
except ImportError as error:
    from pathlib import Path

    folder = Path(__file__).parent
    found = ", ".join(sorted(path.name for path in folder.glob("_bridge*.so"))) or "none"
    raise ImportError(
        f"torchcall: cannot load torchcall._bridge: {error}. Libraries in {folder}: {found}. "
        f"For this Python: `{_requirements.REINSTALL}`"
    ) from error

from torchcall import _interrupts, _native  # noqa: E402

_native.load_torch_half()
_interrupts.install()

__all__ = ["_bridge"]
