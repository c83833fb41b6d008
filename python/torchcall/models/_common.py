"""What the networks share: imports with advice, recognition of files, and the last step."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, ParamSpec, TypeVar

import jax
import numpy as np
import torch

from torchcall.mliap import TorchMliap

P = ParamSpec("P")
T = TypeVar("T")
_NOTHING: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
_LOADING = threading.RLock()
_ENGINES = ("auto", "eager", "script", "package")
PACKAGE_FLAGS = ("second_derivatives", "parallel")
"""Options of `TorchMliap.from_energy`, True or False, on which a compiled package depends."""


def one_at_a_time(load: Callable[P, T]) -> Callable[P, T]:
    """Lets one thread at a time load a network.

    Loading changes what belongs to the process, and restores it: default dtype, environment,
    warnings, functions of the networks' packages.
    """

    @functools.wraps(load)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOADING:
            return load(*args, **kwargs)

    return alone


def require(package: str, network: str) -> ModuleType:
    """Imports the package of a network.

    Args:
        package: name of the module to import.
        network: name of the extra of torchcall that installs it.

    Raises:
        ImportError: it is not installed, or fails to import.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f"torchcall: {network}: expected the package {package}, got {type(error).__name__}: "
            f"{error}; install it with: pip install 'torchcall[{network}]'"
        ) from error


def is_file(source: object, *suffixes: str) -> bool:
    """Whether a source is the path of an existing file, with one of the suffixes if given."""
    if not isinstance(source, str | Path) or not Path(source).is_file():
        return False
    return not suffixes or str(source).lower().endswith(suffixes)


def is_module_of(source: object, package: str) -> bool:
    """Whether a source is a torch module whose class, or a base of it, is defined in a package."""
    return isinstance(source, torch.nn.Module) and any(
        base.__module__.partition(".")[0] == package for base in type(source).__mro__
    )


def pickled_names(path: str | Path) -> frozenset[str]:
    """The names `module.object` that a pickle refers to, without running it.

    Args:
        path: a pickle, or an archive made by `torch.save`.

    Returns:
        The names; empty if the file is neither, or a TorchScript archive.
    """
    return _read_pickle(path)[0]


def pickled_strings(path: str | Path) -> frozenset[str]:
    """The strings in a pickle, such as the keys of its dicts, without running it."""
    return _read_pickle(path)[1]


def _read_pickle(path: str | Path) -> tuple[frozenset[str], frozenset[str]]:
    try:
        if not zipfile.is_zipfile(path):
            with Path(path).open("rb") as file:
                return _contents(file) if file.peek(1)[:1] == b"\x80" else _NOTHING
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            pickles = [name for name in names if name.endswith("/data.pkl")]
            scripted = any(name.endswith("/constants.pkl") for name in names)
            if not pickles or scripted:
                return _NOTHING
            with archive.open(pickles[0]) as file:
                return _contents(file)
    except (OSError, ValueError, zipfile.BadZipFile):
        return _NOTHING


def _contents(file: Any) -> tuple[frozenset[str], frozenset[str]]:
    """The names and strings in a pickle."""
    import pickletools

    names: set[str] = set()
    strings: list[str] = []  # the last two strings pushed are what STACK_GLOBAL takes
    memo: dict[int, str] = {}
    last = ""
    value: Any
    for opcode, value, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            names.add(value.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            names.add(".".join(strings[-2:]))
        elif isinstance(value, str):
            last = value
            strings.append(value)
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[value] = last
        elif opcode.name in ("BINGET", "LONG_BINGET") and value in memo:
            strings.append(memo[value])
    return frozenset(names), frozenset(strings)


def build(
    module: torch.nn.Module,
    *,
    title: str,
    dtype: Any,
    engine: str,
    device: Any,
    verbose: bool,
    script: Callable[[torch.nn.Module], Any] | None = None,
    cutoff: float | None = None,
    **options: Any,
) -> TorchMliap:
    """Makes a potential of a network's energies, and reports it and the stages of its compilation.

    Args:
        module: maps an `AtomGraphInput` to energies (B,); has `cutoff` and `species`.
        title: the network and the model, for the report.
        dtype, engine, device, verbose: as for `torchcall.models.load`.
        script: converts a module to TorchScript; None: `torch.jit.script`.
        cutoff: in Å; None: the module's attribute.
        **options: options of `TorchModuleWrapper`, and `example` of `TorchMliap.from_energy`.

    Raises:
        TypeError, ValueError: an option is wrong.
    """
    engine = checked_engine(engine)
    if checked_device(device) == "cuda" and engine == "package":
        raise ValueError(
            "torchcall: models.load: device: expected 'cpu' for engine='package', got 'cuda'; "
            "compile with torchcall.mliap.compile(..., device='cuda') and load the package"
        )
    model = TorchMliap.from_energy(
        module,
        cutoff,
        dtype=dtype,
        engine=engine,
        _script=script,
        _verbose=verbose,
        **options,
    )
    if verbose:
        report(model, title)
    return model


def checked_engine(engine: Any) -> Literal["auto", "eager", "script", "package"]:
    """The engine's name.

    Raises:
        ValueError: it is unknown.
    """
    if engine not in _ENGINES:
        raise ValueError(
            "torchcall: models.load: engine: expected 'auto', 'eager', 'script' or 'package', "
            f"got {engine!r}"
        )
    return engine


def checked_device(device: object) -> str:
    """The device for which a package is compiled: by default that of JAX's default backend.

    Raises:
        ValueError: it is neither "cpu" nor "cuda", or torch cannot use CUDA.
    """
    if device is None:
        return "cuda" if jax.default_backend() == "gpu" else "cpu"
    name = str(device).partition(":")[0]
    if name not in ("cpu", "cuda"):
        raise ValueError(
            f"torchcall: models.load: device: expected 'cpu' or 'cuda', got {device!r}"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"torchcall: models.load: device: expected 'cpu', because torch cannot use CUDA here, "
            f"got {device!r}"
        )
    return name


def report(model: TorchMliap, title: str) -> None:
    """Writes one line on stderr: what was loaded."""
    species = model.species
    elements = "unknown elements" if species is None else f"{len(species)} elements"
    cutoff = float(np.max(np.asarray(model.cutoff.data)))
    engine = model.wrapper.stats()["engine"]
    print(f"torchcall: {title}: cutoff {cutoff:g} Å, {elements}, {engine}", file=sys.stderr)
