"""`python -m torchcall compile`."""

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

from torchcall._compile._metadata import dtype_name
from torchcall._compile._progress import Progress
from torchcall._engines import unpickle

_EPILOG = """MODULE is FILE.py:FACTORY or PACKAGE.MODULE:FACTORY, a function without arguments that
returns a torch.nn.Module whose forward takes an AtomGraphInput and returns energies; or, with
--allow-pickle, a file made by torch.save(module). See docs/packages.md."""


class UsageError(Exception):
    """An error of the user, reported by its text without a traceback."""


def main(argv: list[str]) -> int:
    """Compiles a module into a package.

    Returns:
        0; 2 after one message on stderr: an argument is wrong, or the module cannot be compiled.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    start = time.perf_counter()
    try:
        written = _run(options)
    except UsageError as error:
        return _fail(f"torchcall: compile: {error}")
    except KeyboardInterrupt:
        return _fail("torchcall: compile: interrupted")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if not str(error).startswith("torchcall:"):  # a bug: show its traceback
            raise
        return _fail(str(error))
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
    )


def load_module(spec: str, *, allow_pickle: bool) -> Any:
    """Calls a factory, or loads a pickled module.

    Raises:
        UsageError: the file, module or function does not exist or fails.
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
        raise UsageError(f"{spec}: the factory fails: {type(error).__name__}: {error}") from error


def _load_pickle(path: Path, *, allow_pickle: bool) -> Any:
    form = "expected FILE.py:FACTORY or PACKAGE.MODULE:FACTORY"
    if not path.is_file():
        raise UsageError(f"{path}: {form}, got neither that nor the name of a file")
    if path.suffix == ".py":
        raise UsageError(f"{path}: {form}, got no factory; write {path}:NAME")
    if not allow_pickle:
        raise UsageError(
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
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{source}: expected a module that can be imported, got {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, name):
        raise UsageError(f"{source}: expected a function {name!r}, got a module without it")
    return getattr(module, name)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"{path}: expected a Python file, got no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: expected a Python file, got something else")
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
        UsageError: ASE is missing or cannot read the file, or the frame has no atoms or edges.
    """
    import jax
    import jax.numpy as jnp

    from torchcall.mliap._adapters import geometry_from_ase
    from torchcall.mliap._compile._example import checked_cutoff
    from torchcall.mliap._graph import AtomGraph
    from torchcall.mliap._neighbors.allocate import neighbor_list

    cutoff = checked_cutoff(cutoff)
    try:
        import ase.io
    except ImportError as error:
        raise UsageError("reading an example needs ASE: pip install ase") from error
    try:
        atoms: Any = ase.io.read(path, index=-1)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"--example {path}: expected a structure that ASE reads, got "
            f"{type(error).__name__}{': ' if reason else ''}{reason}"
        ) from error
    with jax.enable_x64(dtype == "float64"):
        geometry = geometry_from_ase(atoms, dtype=np.dtype(dtype).type)
        positions, cell, pbc, batch = map(jnp.asarray, geometry)
        try:
            search = neighbor_list(cutoff, capacity_multiplier=1.0)
            neighbors = search.allocate(positions, cell, pbc, batch)
        except ValueError as error:
            reason = str(error).removeprefix("torchcall: ")
            raise UsageError(f"--example {path}: {reason}") from error
        if int(neighbors.n_edges) == 0:
            raise UsageError(
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m torchcall compile",
        description="Compile a potential into an AOTInductor package (.pt2).",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("module", metavar="MODULE", help="source of the module, see below")
    parser.add_argument("path", metavar="PACKAGE", help="output file, a name ending in .pt2")
    parser.add_argument(
        "--example", required=True, metavar="FILE", help="a structure file that ASE can read"
    )
    parser.add_argument("--cutoff", required=True, type=float, metavar="Å", help="the model's")
    parser.add_argument(
        "--dtype", choices=["float32", "float64"], help="cast to it (default: the weights' dtype)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument(
        "--static",
        dest="shapes",
        action="store_const",
        const="static",
        help="compile for the example's padded sizes only",
    )
    shapes.add_argument(
        "--dynamic",
        dest="shapes",
        action="store_const",
        const="dynamic",
        help="compile for any sizes, or fail (default: any sizes if possible)",
    )
    parser.add_argument(
        "--no-cache", action="store_true", help="compile even if the package is cached"
    )
    parser.add_argument(
        "--allow-pickle", action="store_true", help="accept a pickled module as MODULE"
    )
    return parser


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 2
