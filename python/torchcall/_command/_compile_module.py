"""What `torchcall compile` runs: reads the module and the example, and compiles."""

import argparse
import contextlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchcall._command.inputs import read_structure
from torchcall._command.parsing import CommandError
from torchcall._compile._metadata import dtype_name
from torchcall._compile._progress import Progress
from torchcall._engines import unpickle


def compile_module(options: argparse.Namespace) -> int:
    """Compiles a module into a package.

    Args:
        options: Those of `torchcall._command.compile`.

    Returns:
        0.

    Raises:
        CommandError: An argument is wrong.
        ValueError, TypeError, OSError, CompileError: The module cannot be compiled.
    """
    from torchcall._compilation_cache import use_compilation_cache

    use_compilation_cache()
    start = time.perf_counter()
    written = _run(options)
    seconds = time.perf_counter() - start
    print(f"torchcall: compile: done in {seconds:.1f} s", file=sys.stderr)
    print(
        f"torchcall: next: model = torchcall.mliap.TorchMliap.from_package({str(written)!r})",
        file=sys.stderr,
    )
    return 0


def _run(options: argparse.Namespace) -> Path:
    from torchcall.mliap._compile._run import run

    progress = Progress(True)
    with progress.stage("loading the module"):
        module = load_module(options.module, allow_pickle=options.allow_pickle)
    name = options.dtype or _dtype_of_weights(module)
    with progress.stage("reading the example"):
        example = read_example(Path(options.example), options.cutoff, name)
    progress.note(
        f"{len(example.positions)} atoms, {int(example.n_edges)} edges within "
        f"{options.cutoff:g} Å, {name}"
    )
    return run(
        module,
        options.path,
        example=example,
        cutoff=options.cutoff,
        dtype=options.dtype,
        device=options.device,
        dynamic={"static": False, "dynamic": True}.get(options.shapes, "auto"),
        cache=not options.no_cache,
        progress=progress,
        second_derivatives=options.second_derivatives,
        parallel=options.parallel,
    )


def load_module(spec: str, *, allow_pickle: bool) -> Any:
    """Calls a factory, or loads a pickled module.

    Raises:
        CommandError: the file, module or function does not exist or fails.
        ValueError, TypeError: the pickle cannot be loaded or does not contain a module.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        return _load_pickle(Path(spec), allow_pickle=allow_pickle)
    factory = _attribute(source, name)
    if isinstance(factory, torch.nn.Module) or not callable(factory):
        return factory
    call: Callable[[], Any] = factory
    try:
        return call()
    except Exception as error:
        raise CommandError(f"{spec}: the factory fails: {type(error).__name__}: {error}") from error


def _load_pickle(path: Path, *, allow_pickle: bool) -> Any:
    form = "expected FILE.py:FACTORY or PACKAGE.MODULE:FACTORY"
    if not path.is_file():
        raise CommandError(f"{path}: {form}, got neither that nor the name of a file")
    if path.suffix == ".py":
        raise CommandError(f"{path}: {form}, got no factory; write {path}:NAME")
    if not allow_pickle:
        raise CommandError(
            f"{path}: {form}, got a file. If it is a pickled module: unpickling can run any code; "
            "if you trust the file, pass --allow-pickle"
        )
    return unpickle(path)


def _attribute(source: str, name: str) -> Any:
    try:
        if source.endswith(".py"):
            module = _from_file(Path(source))
        else:
            module = importlib.import_module(source)
    except CommandError:
        raise
    except Exception as error:
        raise CommandError(
            f"{source}: expected a module that can be imported, got {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        raise CommandError(f"{source}: expected a function {name!r}, got a module without it")
    return getattr(module, name)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise CommandError(f"{path}: expected a Python file, got no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise CommandError(f"{path}: expected a Python file, got something else")
    module = importlib.util.module_from_spec(spec)
    # Pickles and TorchScript look up classes by module, so the module must be registered.
    sys.modules.setdefault(path.stem, module)
    with _importable(path.resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _importable(folder: Path) -> Any:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def read_example(path: Path, cutoff: float, dtype: str) -> Any:
    """The last frame of a file that ASE can read, as an `AtomGraph`.

    Raises:
        CommandError: ASE is missing or cannot read the file, or the frame has no atoms or edges.
    """
    import jax
    import jax.numpy as jnp

    from torchcall.mliap._adapters import geometry_from_ase
    from torchcall.mliap._compile._example import checked_cutoff
    from torchcall.mliap._graph import AtomGraph
    from torchcall.mliap._neighbors.allocate import neighbor_list

    cutoff = checked_cutoff(cutoff)
    atoms = read_structure(path, "--example")
    with jax.enable_x64(dtype == "float64"):
        geometry = geometry_from_ase(atoms, dtype=np.dtype(dtype).type)
        positions, cell, pbc, batch = map(jnp.asarray, geometry)
        try:
            search = neighbor_list(cutoff, capacity_multiplier=1.0)
            neighbors = search.allocate(positions, cell, pbc, batch)
        except ValueError as error:
            reason = str(error).removeprefix("torchcall: ")
            raise CommandError(f"--example {path}: {reason}") from error
        if int(neighbors.n_edges) == 0:
            raise CommandError(
                f"--example {path}: expected atoms within {cutoff:g} Å of each other, got none"
            )
        numbers = jnp.asarray(atoms.numbers, jnp.int32)
        charge, spin = jnp.asarray(geometry.charge), jnp.asarray(geometry.spin)
        return AtomGraph.from_neighbors(
            neighbors, positions, cell, numbers, charge=charge, spin=spin
        )


def _dtype_of_weights(module: Any) -> str:
    """float64 if all weights of a module are float64, else float32."""
    tensors = module.parameters() if isinstance(module, torch.nn.Module) else ()
    dtypes = {dtype_name(tensor.dtype) for tensor in tensors if tensor.dtype.is_floating_point}
    return "float64" if dtypes == {"float64"} else "float32"
