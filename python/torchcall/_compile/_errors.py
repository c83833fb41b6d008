"""Errors for modules that cannot be compiled: the operation, its source line, alternatives."""

import sysconfig
import traceback
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, resolve_name

from torchcall._undocumented.of_torch import OperatorBase

REMEDY = (
    "Use the module without compilation: as torch.jit.script(module) if it can be scripted, or as "
    "an eager module, which runs in Python"
)

_ADVICE = (
    "\n\nCaused by: ",
    "\nThe following call raised",
    "\nFor more information",
    "\nPotential framework",
)
_LARGEST_MESSAGE = 1200  # characters of torch's message


class CompileError(RuntimeError):
    """A module could not be compiled into a package."""


class ExportError(CompileError):
    """torch cannot trace, export or compile an operation of the module, whatever the sizes."""


class SpecialisedError(Exception):
    """A graph is valid for some shapes only. The text names the axis and the line that fixes it."""


class ToolchainError(CompileError):
    """This machine cannot compile any module."""


class Watch(TorchFunctionMode):
    """Records the first torch function that raises while the mode is active."""

    failed: str | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            if self.failed is None:
                self.failed = resolve_name(func) or getattr(func, "__name__", str(func))
            raise


def cannot_export(
    name: str, stage: str, error: BaseException, watch: Watch | None = None
) -> ExportError:
    """The error for a module that runs in eager mode but cannot be compiled.

    Args:
        name: the name of the module's class.
        stage: a participle, such as "traced" in "cannot be traced".
        error: what torch raised.
        watch: the mode that was active.
    """
    operation = _operation(error) or (watch.failed if watch else None)
    place = _place(error)
    what = f"operation {operation}" if operation else "an operation that torch does not name"
    where = f", {place}" if place else ""
    return ExportError(
        f"torchcall: {name}: compile: the module cannot be {stage}: {what}{where}. {REMEDY}.\n"
        f"{message_of(error)}"
    )


def message_of(error: BaseException) -> str:
    """torch's message, without advice for torch's developers."""
    text = f"{type(error).__name__}: {error}".strip()
    for advice in _ADVICE:
        text = text.partition(advice)[0]
    if len(text) > _LARGEST_MESSAGE:
        text = text[:_LARGEST_MESSAGE] + " …"
    return text


def _operation(error: BaseException) -> str | None:
    """The operator that an exception of torch, or one of its causes, names."""
    for link in _chain(error):
        function = getattr(link, "func", None)
        if isinstance(function, OperatorBase):
            return str(function)
        for line in str(link).splitlines():
            if line.strip().startswith("target: "):  # an operator that inductor lacks
                return line.strip().removeprefix("target: ")
    return None


def _place(error: BaseException) -> str | None:
    """The innermost line of code outside torch, torchcall and the standard library."""
    for link in _chain(error):
        for frame in reversed(traceback.extract_tb(link.__traceback__)):
            if _is_internal(frame.filename):
                continue
            line = f": `{frame.line}`" if frame.line else ""
            return f"at {Path(frame.filename).name}:{frame.lineno} in {frame.name}{line}"
    return None


_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parents[1])
_STANDARD = sysconfig.get_paths()["stdlib"]


def _is_internal(filename: str) -> bool:
    if filename.startswith((_TORCH, _HERE, "<")):
        return True
    return filename.startswith(_STANDARD) and "site-packages" not in filename


def _chain(error: BaseException) -> list[BaseException]:
    links: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in links:
        links.append(link)
        link = getattr(link, "inner_exception", None) or link.__cause__ or link.__context__
    return links
