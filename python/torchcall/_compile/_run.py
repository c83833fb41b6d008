"""Steps that every compilation shares: options, output file, cache, build, checks."""

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import Timeout
from torch.export import ExportedProgram
from torch.fx import GraphModule

from torchcall._compile import _cache
from torchcall._compile._build import build, lock_of, options
from torchcall._compile._compare import DifferentError
from torchcall._compile._errors import CompileError
from torchcall._compile._folder import cache_folder
from torchcall._compile._progress import Progress
from torchcall._compile._shortcuts import shortcuts
from torchcall._engines.package_file import DERIVATIVE
from torchcall._undocumented.of_compiler import aoti_load_package, load_package

# torch's exporter and compiler keep their state in module globals.
_LOCK = threading.RLock()


def check_flags(dynamic: object, **others: object) -> None:
    """Checks the option `dynamic`, and others that are True or False.

    Raises:
        ValueError: an option has another value; the message names it.
    """
    for name, value in {"dynamic": dynamic, **others}.items():
        allowed = ("auto", True, False) if name == "dynamic" else (True, False)
        if not any(value is choice or value == choice == "auto" for choice in allowed):
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"torchcall: compile: {name}: expected {expected}, got {value!r}")


@contextlib.contextmanager
def caching(device: torch.device) -> Iterator[Path]:
    """A temporary file in the cache's folder, like `writing` but without an output file.

    Raises:
        OSError: the cache's folder cannot be written.
    """
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            _LOCK,
            _compilation_modes(device),
            _cache.temporary_beside(folder / "new.pt2") as temporary,
        ):
            yield temporary
    except OSError as error:
        raise type(error)(
            f"torchcall: compile: expected a writable cache of packages, got {folder}: "
            f"{error.strerror or error}; set TORCHCALL_CACHE to another folder"
        ) from error


@contextlib.contextmanager
def writing(path: str | Path, device: torch.device, progress: Progress) -> Iterator[Path]:
    """A temporary file beside `path`, which it replaces atomically when the body succeeds.

    Other threads that compile wait. torch's modes are set for compilation and restored.

    Raises:
        TypeError, ValueError, OSError: the path cannot be used.
    """
    target = checked_path(path)
    with _LOCK, _compilation_modes(device), _temporary(target) as temporary:
        yield temporary
        os.replace(temporary, target)
    progress.note(f"wrote {target}")


class Derivative(NamedTuple):
    """The second program of a package, see `CompiledDerivative`.

    Attributes:
        program: what to compile.
        compare: raises `DifferentError` if the loaded program's results differ from the module's.
    """

    program: GraphModule
    compare: Callable[[Callable[..., Any]], None]


def produce(
    name: str,
    program: ExportedProgram | GraphModule,
    metadata: dict[str, Any],
    device: torch.device,
    compare: Callable[[Callable[..., Any]], None],
    *,
    to: Path,
    cache: bool,
    parallel: bool,
    progress: Progress,
    derivative: Derivative | None = None,
) -> str:
    """Takes the package from the cache or builds it, and compares its results with the module's.

    Waits for another process that builds the same model, and then takes its package.

    Args:
        name: what errors call the module.
        program: what to compile, see `build`.
        metadata: the package's metadata, part of the cache's key.
        device: the device to compile for.
        compare: raises `DifferentError` if a loaded package's results differ from the module's.
        to: the file to fill.
        cache: whether to use the cache.
        parallel: see `options`.
        progress: where to report the stages.
        derivative: the second program, if the package is to have one.

    Returns:
        The key of the cache's entry; empty without the cache.

    Raises:
        DifferentError, SpecialisedError, CompileError: it cannot be built, or its results differ.
    """

    def check() -> None:
        """Raises RuntimeError if a program does not load."""
        compare(aoti_load_package(str(to)))
        if derivative is not None:
            derivative.compare(load_package(str(to), DERIVATIVE))

    configs = options(device, parallel=parallel)
    key = _cache.key_of(metadata, configs) if cache else ""
    if key and _taken(key, to, check, progress):
        return key
    with contextlib.ExitStack() as stack:
        lock = lock_of(metadata["content"])
        try:
            stack.enter_context(lock.acquire(blocking=False))
        except Timeout:
            with progress.stage("waiting for another process that compiles it"):
                stack.enter_context(lock.acquire())
        if key and _taken(key, to, check, progress):  # made in the meantime
            return key
        programs = [program] if derivative is None else [program, derivative.program]
        nodes = [node for each in programs for node in each.graph.nodes]
        operators = sum(node.op == "call_function" for node in nodes)
        expected = _expected_time(operators, len(programs))
        with progress.stage(f"compiling {operators} operators ({expected} if quiet)"):
            build(name, program, to, metadata, configs, derivative and derivative.program)
        with progress.stage("checking its results against the module"):
            try:
                check()
            except RuntimeError as error:
                raise CompileError(
                    f"torchcall: {name}: compile: expected a package that loads, got an error: "
                    f"{error}"
                ) from error
        if key:
            _cache.store(key, to)
        return key


def _taken(key: str, to: Path, check: Callable[[], None], progress: Progress) -> bool:
    """Fills the file with the cache's package, if there is one whose results are the module's."""
    entry = _cache.find(key, to)
    if entry is None:
        return False
    with progress.stage("checking the package from the cache"):
        try:
            check()
        except (DifferentError, RuntimeError):  # not valid here: build it again
            entry.unlink(missing_ok=True)
            return False
    return True


def _expected_time(operators: int, programs: int = 1) -> str:
    """The time that torch's compiler takes on a quiet machine: a range, as operators differ.

    Measured: near the lower end for Lennard-Jones and MACE, near the upper end for 7net-0.
    """
    least = 10 * programs + operators / 30
    low, high = (
        f"{10 * round(t / 10)} s" if t <= 90 else f"{t / 60:.0f} min" for t in (least, 3 * least)
    )
    same = low.split()[1] == high.split()[1]
    return f"{low.split()[0] if same else low} to {high}"


def checked_device(device: str | torch.device) -> torch.device:
    """The device. Raises ValueError unless it is a CPU or a CUDA device that torch can use."""
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(_expected(repr(device))) from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(_expected(repr(str(place))))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(_expected(f"{str(place)!r}, which torch cannot use here"))
    return place


def _expected(got: str) -> str:
    return f"torchcall: compile: device: expected 'cpu' or 'cuda', got {got}"


def checked_path(path: str | Path) -> Path:
    """The path. Raises TypeError, ValueError or IsADirectoryError unless it names a `.pt2` file."""
    if not isinstance(path, str | Path):
        raise TypeError(
            f"torchcall: compile: path: expected a str or a Path, got {type(path).__name__}"
        )
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(
            f"torchcall: compile: path: expected the name of a file, got the directory {target}"
        )
    if target.suffix != ".pt2":
        raise ValueError(
            f"torchcall: compile: path: expected a name that ends in .pt2, got {str(path)!r}"
        )
    return target


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A file beside the target. Made first, so that a read-only folder is an early error."""
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(_cache.temporary_beside(target))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            kind = type(error) if isinstance(error, OSError) else ValueError
            raise kind(
                f"torchcall: compile: path: expected a writable folder, got "
                f"{target.parent}: {reason}"
            ) from error
        yield temporary


@contextlib.contextmanager
def _compilation_modes(device: torch.device) -> Iterator[None]:
    """Enables autograd, disables autocast and warnings. Restores these, the seed and variables."""
    environment = dict(os.environ)
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[]),
        shortcuts(),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            # torch's compiler sets environment variables for its subprocesses.
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)
