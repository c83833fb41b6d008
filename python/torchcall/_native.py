"""Loads the torch half that matches the installed torch, and registers the FFI handlers."""

import os
import threading
from pathlib import Path
from typing import Any

import jax
import torch

from torchcall import _bridge
from torchcall._requirements import REBUILD, REINSTALL, require_whole
from torchcall._versions import minor, numbers

TARGET = "torchcall"

_registered: set[str] = set()
_register_lock = threading.Lock()


def library_root() -> Path:
    """The folder of the compiled libraries; not the source folder in an editable install."""
    return Path(_bridge.__file__).parent


def find_torch_half(torch_version: str, root: Path) -> Path:
    """The path of the torch half under `root` for this torch version.

    libtorch's C++ ABI changes with every minor release, and a mismatch gives wrong results
    silently, so the minor version must be equal.

    Raises:
        ImportError: if there is none; names the installed torch and the supported ones.
    """
    wanted = minor(torch_version)
    found = list((root / "lib" / f"torch-{wanted}").glob("*torchcall_torch.*"))
    if found:
        return found[0]
    built = [p.name.removeprefix("torch-") for p in (root / "lib").glob("torch-*")]
    built.sort(key=numbers)
    install = f"`pip install 'torch=={built[-1]}.*'`, or " if built else ""
    raise ImportError(
        f"torchcall: expected torch {' or '.join(built) or '(none was built)'}, which this "
        f"torchcall was built for, got torch {torch_version}; {install}build torchcall for this "
        f"torch: `{REBUILD}`. Tried: {root / 'lib' / f'torch-{wanted}'}"
    )


def load_torch_half() -> Path:
    """Loads the torch half into the process. `TORCHCALL_TORCH_HALF` names another library file.

    Raises:
        ImportError: if there is none for this torch, or it cannot be loaded.
    """
    override = os.environ.get("TORCHCALL_TORCH_HALF")
    path = Path(override) if override else find_torch_half(torch.__version__, library_root())
    require_whole(path)
    try:
        _bridge.load_torch_half(str(path))
    except RuntimeError as error:
        raise ImportError(
            f"torchcall: cannot load {path} with torch {torch.__version__} "
            f"in {Path(torch.__file__).parent}: {error}\n"
            "Likely causes: torch was replaced after torchcall was built, or the file is damaged. "
            f"Install torchcall again: `{REINSTALL}`; or build it for this torch: `{REBUILD}`"
        ) from error
    built_for = _bridge.torch_half_version()
    if minor(built_for) != minor(torch.__version__):
        raise ImportError(
            f"torchcall: {path}: expected a library built for torch {minor(torch.__version__)}, "
            f"got one built for torch {built_for}"
        )
    return path


def register_target(platform: str) -> None:
    """Registers the FFI handlers for a platform, once. Its client must be running.

    A starting XLA CPU client registers queued targets before queued types, and refuses a target
    with an unknown state type. This function is therefore called during lowering, when the client
    runs and nothing is queued.
    """
    with _register_lock:
        if platform in _registered:
            return
        state_type: Any = _bridge.state_type(platform)
        jax.ffi.register_ffi_type(f"{TARGET}_state", state_type, platform=platform)
        jax.ffi.register_ffi_target(TARGET, _bridge.handlers(platform), platform=platform)
        _registered.add(platform)


def prepare_cuda() -> str | None:
    """Initialises torch for calls on CUDA devices. Returns the reason if that is impossible."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no usable CUDA device"
    torch.cuda.init()
    from torchcall._cuda.capture import capture, warn

    with _register_lock:
        if "capture" not in _registered:
            _bridge.set_graph_tools(capture, warn)
            _registered.add("capture")
    return None
