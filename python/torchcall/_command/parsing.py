"""Options and one-line errors. Imports the standard library only, so that errors come at once."""

import argparse
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torchcall import _requirements

PROGRAM = "torchcall" if Path(sys.argv[0]).stem == "torchcall" else "python -m torchcall"


class CommandError(Exception):
    """An error that the user can fix. The command prints its text, without a traceback.

    Attributes:
        status: The exit status: 2 for a wrong option or input, 1 for a run that failed.
    """

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Parser(argparse.ArgumentParser):
    """Raises `CommandError` for wrong options.

    Attributes:
        words: What `parse_args` parsed last.
    """

    words: Sequence[str] = ()

    def __init__(self, command: str, description: str, **settings: Any) -> None:
        super().__init__(
            prog=f"{PROGRAM} {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{message.removeprefix('argument ')} (see {self.prog} --help)")

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As `argparse` has it."""
        self.words = sys.argv[1:] if args is None else list(args)
        return super().parse_args(self.words, namespace)

    def given(self) -> set[str]:
        """The options that were on the command line, by the names of their values."""
        defaults = {action: action.default for action in self._actions}
        try:
            for action in defaults:
                action.default = argparse.SUPPRESS
            return set(vars(super().parse_args(self.words)))
        finally:
            for action, default in defaults.items():
                action.default = default


def number(
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    kind: type = float,
) -> Callable[[str], Any]:
    """A type of argparse: a finite number, above one bound and within the others."""
    wanted = "a whole number" if kind is int else "a number"
    if above > -math.inf:
        wanted += f" above {above:g}"
    if least > -math.inf:
        wanted += f", at least {least:g}"
    if most < math.inf:
        wanted += f", at most {most:.10g}"

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > above and least <= value <= most):
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return convert


def existing_file(text: str) -> Path:
    """A type of argparse: the path of a file that exists."""
    path = Path(text)
    if not path.is_file():
        reason = "got a folder" if path.is_dir() else "no such file"
        raise argparse.ArgumentTypeError(f"{text}: expected a file, {reason}")
    return path


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """A type of argparse: a path in an existing folder, with one of the suffixes if given."""

    def convert(text: str) -> Path:
        path = Path(text)
        if suffixes and path.suffix not in suffixes:
            raise argparse.ArgumentTypeError(
                f"{text}: expected a name ending in {' or '.join(suffixes)}"
            )
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: expected a file, got a folder")
        if not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"{text}: no such folder: {path.absolute().parent}")
        return path

    return convert


def require(package: str, purpose: str, extra: str) -> None:
    """Checks that an optional package is installed, without importing it.

    Raises:
        CommandError: It is not; names the extra to install.
        ImportError: JAX or torch is missing, too.
    """
    if sys.modules.get(package, package) is None or importlib.util.find_spec(package) is None:
        _requirements.check()
        raise CommandError(
            f"{purpose} needs the package {package}: pip install 'torchcall[{extra}]'"
        )
