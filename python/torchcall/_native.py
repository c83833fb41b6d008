"""Loads the torch half that was built for the installed torch, and nothing else."""

import os
import threading
from pathlib import Path
from typing import Any

import jax
import torch

from torchcall import _bridge

TARGET = "torchcall"

_registered: set[str] = set()
_register_lock = threading.Lock()


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def library_root() -> Path:
    """The folder that holds the compiled parts; apart from the sources in an editable install."""
    return Path(_bridge.__file__).parent


def find_torch_half(torch_version: str, root: Path) -> Path:
    """Returns the torch half under `root` for this torch.

    libtorch's C++ ABI changes with every minor release and is silently wrong when mixed, so only
    the exact minor will do.

    Raises:
        ImportError: naming the torch that is installed and the ones that torchcall was built for.
    """
    wanted = _minor(torch_version)
    found = list((root / "lib" / f"torch-{wanted}").glob("*torchcall_torch.*"))
    if found:
        return found[0]
    built = sorted(p.name.removeprefix("torch-") for p in (root / "lib").glob("torch-*"))
    raise ImportError(
        f"torchcall: expected torch {' or '.join(built) or '(none was built)'}, which this "
        f"torchcall was built for, got torch {torch_version}; install a matching torch, or rebuild "
        "torchcall with `pip install --no-build-isolation --force-reinstall --no-deps torchcall`"
    )


def load_torch_half() -> Path:
    """Loads the torch half into the process. `TORCHCALL_TORCH_HALF` names another library file.

    Raises:
        ImportError: if there is none for this torch, or it does not load.
    """
    override = os.environ.get("TORCHCALL_TORCH_HALF")
    path = Path(override) if override else find_torch_half(torch.__version__, library_root())
    try:
        _bridge.load_torch_half(str(path))
    except RuntimeError as error:
        raise ImportError(
            f"torchcall: {path} does not load with torch {torch.__version__}: {error}\n"
            "Likely causes: torch was replaced after torchcall was built, or the file is damaged; "
            "rebuilding torchcall against the installed torch mends both."
        ) from error
    built_for = _bridge.torch_half_version()
    if _minor(built_for) != _minor(torch.__version__):
        raise ImportError(
            f"torchcall: {path}: expected a library built for torch {_minor(torch.__version__)}, "
            f"got one built for torch {built_for}"
        )
    return path


def register_target(platform: str) -> None:
    """Registers the FFI handlers for a platform whose client is running, once.

    The calls' state is a registered type. XLA's CPU client takes queued targets before queued types
    when it starts, and refuses a target whose state type it does not know yet; so nothing is
    queued: this runs while a program is lowered, when the client is there.
    """
    with _register_lock:
        if platform in _registered:
            return
        state_type: Any = _bridge.state_type(platform)
        jax.ffi.register_ffi_type(f"{TARGET}_state", state_type, platform=platform)
        jax.ffi.register_ffi_target(TARGET, _bridge.handlers(platform), platform=platform)
        _registered.add(platform)


def prepare_cuda() -> str | None:
    """Makes torch ready for calls on CUDA devices, or says why they are impossible."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no device that it can use"
    torch.cuda.init()
    from torchcall._cuda.capture import capture, warn

    with _register_lock:
        if "capture" not in _registered:
            _bridge.set_graph_tools(capture, warn)
            _registered.add("capture")
    return None
