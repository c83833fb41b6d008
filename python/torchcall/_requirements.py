"""The packages that torchcall needs at run time. Imports neither the bridge nor the torch half."""

import importlib
import struct
from pathlib import Path
from types import ModuleType

from torchcall._versions import JAX, OLDEST_JAX, TORCH, satisfies

REINSTALL = "pip install --force-reinstall --no-deps torchcall"
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


def require_whole(path: Path) -> None:
    """Raises ImportError for an ELF library that lacks its end, which would end the process.

    The section headers are the last part of a library.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
        size = path.stat().st_size
    except OSError:
        return  # the loader's own message says more
    if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little endian
        return
    (offset,) = struct.unpack_from("<Q", header, 40)
    length, number = struct.unpack_from("<HH", header, 58)
    if size < offset + length * number:
        raise ImportError(
            f"torchcall: {path}: expected {offset + length * number} bytes, got {size}: the file "
            f"is incomplete; install torchcall again: `{REINSTALL}`"
        )


def check_bridge() -> None:
    """Raises ImportError if the JAX half's file is incomplete."""
    for path in Path(__file__).parent.glob("_bridge*.so"):
        require_whole(path)
