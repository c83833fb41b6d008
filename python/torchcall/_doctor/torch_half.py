"""The torch half: which one is in use, why, and which others there are."""

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from torchcall._doctor.report import Section, import_error, imported, one_line
from torchcall._requirements import REBUILD, REINSTALL, check_bridge
from torchcall._versions import minor, numbers

VARIABLE = "TORCHCALL_TORCH_HALF"


def probe(section: Section) -> None:
    """Loads the torch half as `import torchcall` does; reports a failure with its remedy."""
    override = os.environ.get(VARIABLE) or None
    found = halves()
    section.values |= {
        "path": None,
        "built_for": None,
        "loaded": False,
        "override": override,
        "found": [{"torch": minor, "path": str(path)} for minor, path in found.items()],
    }
    section.show("found", ", ".join(f"torch {minor}" for minor in found) or "none")
    if override:
        section.show(VARIABLE, override)
    missing = [name for name in ("jax", "torch") if imported(name) is None]
    if missing:
        section.show("in use", f"none: {missing[0]} cannot be imported")
    elif (error := _bridge_error()) is not None:
        section.show("in use", "none: the JAX half cannot be imported")
        section.problem(f"the JAX half cannot be imported: {one_line(error)}", REINSTALL)
    elif (error := import_error("torchcall._loaded")) is not None:
        _failed(section, error, override, found)
    else:
        _loaded(section, override)


def _bridge_error() -> BaseException | None:
    try:
        check_bridge()
    except ImportError as error:
        return error
    return import_error("torchcall._bridge")


def _loaded(section: Section, override: str | None) -> None:
    torch: Any = imported("torch")
    native: Any = importlib.import_module("torchcall._native")
    bridge: Any = importlib.import_module("torchcall._bridge")
    path = override or native.find_torch_half(torch.__version__, native.library_root())
    why = f"named by {VARIABLE}" if override else f"torch {torch.__version__} is installed"
    section.values |= {
        "path": str(path),
        "built_for": bridge.torch_half_version(),
        "loaded": True,
    }
    section.show("in use", f"{path}")
    section.show("because", why)
    section.show("built for", f"torch {bridge.torch_half_version()}")


def _failed(
    section: Section, error: BaseException, override: str | None, found: dict[str, Path]
) -> None:
    torch: Any = imported("torch")
    reason = str(error).strip().splitlines()[0].removeprefix("torchcall: ")
    section.show("in use", "none: it cannot be loaded")
    if override:
        remedy = f"unset {VARIABLE}"
    elif minor(str(torch.__version__)) not in found and found:
        remedy = f"pip install 'torch=={list(found)[-1]}.*'"
    else:
        remedy = REINSTALL if "incomplete" in reason else REBUILD
    section.problem(reason, remedy)


def halves() -> dict[str, Path]:
    """The torch halves beside the JAX half, by minor version of torch, oldest first."""
    try:
        spec = importlib.util.find_spec("torchcall._bridge")
    except (ImportError, ValueError, OSError):
        spec = None
    root = Path(spec.origin).parent if spec and spec.origin else Path(__file__).parents[1]
    found: dict[str, Path] = {}
    for path in (root / "lib").glob("torch-*/*torchcall_torch.*"):
        found[path.parent.name.removeprefix("torch-")] = path
    return dict(sorted(found.items(), key=lambda item: numbers(item[0])))
