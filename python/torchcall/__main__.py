"""The command `torchcall`, also `python -m torchcall`.

Imports neither jax nor torch before a command's options are checked.
"""

import importlib
import os
import signal
import sys
from contextlib import suppress
from typing import Any, NoReturn

from torchcall._command.memory import keep_memory
from torchcall._command.parsing import PROGRAM, CommandError, Parser

# Modules of `torchcall._command`, with a docstring, `add_options(parser)` and `run(options)`.
COMMANDS = {
    "energy": "energy, forces, stress and pressure of a structure under a potential",
    "relax": "relax a structure, or structure and cell, under a potential",
    "md": "molecular dynamics of a structure under a potential; continues after an interruption",
    "demo": "argon atoms under a TorchScript potential inside one jitted loop, and the callbacks",
    "compile": "compile a potential (a torch.nn.Module) into an AOTInductor package",
    "doctor": "report versions, devices, caches and settings, and test each engine",
}

# Packages that are imported without a check of their own.
_NEEDED = ("filelock", "jaxtyping", "numpy", "platformdirs", "typing_extensions")
_NO_READER = 141  # as after SIGPIPE, in a shell


def program() -> NoReturn:
    """The process of a command. The second Ctrl-C does not disturb its end; the third kills it."""
    presses = 0

    def interrupt(*_: Any) -> None:
        nonlocal presses
        presses += 1
        if presses == 1:
            raise KeyboardInterrupt
        if presses > 2:
            os._exit(130)

    signal.signal(signal.SIGINT, interrupt)
    sys.exit(main())


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0; 1 if the run failed; 2 for a wrong option or input; 130 after Ctrl-C;
        143 after SIGTERM; 141 if nobody reads its output any more, as after `| head -1`.
    """
    try:
        status = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes the streams again when it ends.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                os.dup2(nowhere, stream.fileno())
        return _NO_READER
    return status


def _run(argv: list[str] | None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(_usage(), end="")
        return 0
    if name == "--version":
        from torchcall import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        expected = ", ".join(COMMANDS)
        return _fail(f"expected a command ({expected}), got {name!r} (see {PROGRAM} --help)", 2)
    try:
        command = importlib.import_module(f"torchcall._command.{name}")
        parser = Parser(name, command.__doc__ or "")
        command.add_options(parser)
        try:
            options = parser.parse_args(rest)
        except SystemExit as leaving:  # --help
            return int(leaving.code or 0)
        keep_memory()
        return command.run(options)
    except CommandError as error:
        return _fail(f"{name}: {error}", error.status)
    except KeyboardInterrupt as error:  # or SIGTERM, with a status of its own
        return _fail(f"{name}: {str(error) or 'interrupted'}", getattr(error, "status", 130))
    except MemoryError:
        return _fail(f"{name}: out of memory", 1)
    except BrokenPipeError:
        raise
    except Exception as error:
        # Errors of models and files start with "torchcall:". Anything else is a bug and needs its
        # traceback, unless a package is missing or too old.
        _, prefix, reason = str(error).partition("torchcall:")
        if (not prefix or isinstance(error, ImportError)) and (lacking := _lacking()):
            return _fail(lacking, 1)
        if isinstance(error, ModuleNotFoundError) and error.name in _NEEDED:
            return _fail(f"{name}: needs the package {error.name}: pip install {error.name}", 1)
        if not prefix:
            raise
        return _fail(reason.strip(), 2)


def _lacking() -> str:
    """What `import torchcall` says about a package that is missing or too old, else empty."""
    try:
        importlib.import_module("torchcall._requirements").check()
    except ImportError as error:
        return str(error).removeprefix("torchcall: ")
    return ""


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help lists the options of a command.",
            "",
        ]
    )


def _fail(reason: str, status: int) -> int:
    print(f"torchcall: {reason}", file=sys.stderr)
    return status


if __name__ == "__main__":
    program()
