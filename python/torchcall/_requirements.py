"""The packages that torchcall needs at run time. Imports neither the bridge nor the torch half."""

import importlib
from types import ModuleType

from torchcall._versions import JAX, OLDEST_JAX, TORCH, satisfies

REBUILD = (
    "pip install --no-build-isolation --no-binary torchcall --force-reinstall --no-deps torchcall"
)


def _import(name: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a damaged package raises OSError, AttributeError and others
        state = "is not installed" if _is_missing(error, name) else f"cannot be imported: {error!r}"
        raise ImportError(
            f"torchcall: {name} {state}; install it: `pip install {install}`"
        ) from error


def _is_missing(error: Exception, name: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == name


def check() -> None:
    """Imports jaxlib, jax and torch.

    Raises:
        ImportError: one is missing or damaged, or JAX is too old. Names the command that helps.
    """
    for name in ("jaxlib", "jax"):
        install = f"'{JAX}'"
        version = _import(name, install).__version__
        if not satisfies(version, f">={OLDEST_JAX}"):
            raise ImportError(
                f"torchcall: expected {name} {OLDEST_JAX} or newer, got {name} {version}; "
                f"`pip install --upgrade {install}`"
            )
    _import("torch", f"'{TORCH}'")
