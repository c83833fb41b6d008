"""The order of events in `torchcall.compile`, and what stays as it was."""

import contextlib
import os
import shutil
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch._inductor import aoti_load_package

from torchcall._compile import _cache
from torchcall._compile._build import build, content_of, export_graph, options
from torchcall._compile._cases import Case, dynamic_cases, resized, static_cases
from torchcall._compile._check import DifferentError, References, graph_function
from torchcall._compile._errors import CompileError, ToolchainError
from torchcall._compile._example import checked_cutoff, checked_dtype, example_tensors
from torchcall._compile._form import INPUTS, B, E, Graph, N, Sizes, metadata_of, shape_of, sizes_of
from torchcall._compile._gradients import Potential, failed_on_example
from torchcall._compile._progress import Progress
from torchcall._compile._trace import SpecialisedError, Traced, trace

# torch's exporter and compiler keep their state in module globals.
_LOCK = threading.RLock()


def run(
    module: torch.nn.Module,
    path: str | Path,
    *,
    example: Any,
    cutoff: float,
    dtype: Any,
    device: str | torch.device,
    dynamic: Literal["auto"] | bool,
    cache: bool,
    progress: Progress,
) -> Path:
    """`torchcall.compile` with the progress to report to."""
    length, floats, place = checked_cutoff(cutoff), checked_dtype(dtype), _checked_device(device)
    for name, value, allowed in (
        ("dynamic", dynamic, ("auto", True, False)),
        ("cache", cache, (True, False)),
    ):
        if not any(value is choice or value == choice == "auto" for choice in allowed):
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"torchcall: compile: {name}: expected {expected}, got {value!r}")
    target = _checked_path(path)
    with _LOCK, _undisturbed(place), _temporary(target) as temporary:
        with progress.stage("looking at the module"):
            potential = Potential(module, floats, place)
            graph = example_tensors(example, cutoff=length, dtype=floats, device=place)
            try:
                potential.look_at(graph)
            except (CompileError, TypeError, ValueError) as error:
                if str(error).startswith("torchcall: "):
                    raise
                raise failed_on_example(potential, error, graph) from error
            except Exception as error:
                raise failed_on_example(potential, error, graph) from error
        if potential.was_training:
            progress.note("the module is in training mode; it is compiled as in eval mode")
        job = _Job(potential, graph, length, temporary, cache, progress)
        _write(job, dynamic)
        os.replace(temporary, target)
    progress.note(f"wrote {target}")
    return target


class _Job(NamedTuple):
    potential: Potential
    example: Graph
    cutoff: float
    temporary: Path
    cache: bool
    progress: Progress


def _write(job: _Job, dynamic: Literal["auto"] | bool) -> None:
    """Fills the temporary file, by the first way that works."""
    name = job.potential.name
    if dynamic is not False:
        try:
            _attempt(job, dynamic=True)
            return
        except ToolchainError:
            raise
        except (SpecialisedError, DifferentError, CompileError) as error:
            if dynamic is True:
                if isinstance(error, CompileError):
                    raise
                raise CompileError(
                    f"torchcall: {name}: compile: dynamic: expected a module that serves any "
                    f"numbers of atoms, edges and systems, got one that does not: {error}; "
                    "dynamic=False makes a package for the example's padded sizes"
                ) from error
            sizes = sizes_of(job.example)
            job.progress.note(f"not for any shapes: {str(error).splitlines()[0]}")
            job.progress.note(
                f"instead for a capacity of {sizes[N]} atoms, {sizes[E]} edges and {sizes[B]} "
                "systems, phantoms included"
            )
    try:
        _attempt(job, dynamic=False)
    except (SpecialisedError, DifferentError) as error:
        raise CompileError(
            f"torchcall: {name}: compile: expected what the module itself gives, got something "
            f"else: {error}. A model that draws random numbers, or that keeps state from call to "
            "call, cannot be compiled"
        ) from error


def _attempt(job: _Job, *, dynamic: bool) -> None:
    potential, progress = job.potential, job.progress
    shapes = "any shapes" if dynamic else "fixed shapes"
    with progress.stage(f"tracing {potential.name} for {shapes}"):
        example = _of_distinct_sizes(job.example) if dynamic else job.example
        traced = trace(potential, example, dynamic=dynamic)
        references = References(potential, _cases(job, traced, dynamic=dynamic))
        references.compare(graph_function(traced.module, potential.outputs()))
    metadata = metadata_of(
        name=potential.name,
        device=example["pos"].device,
        dtype=potential.dtype,
        cutoff=job.cutoff,
        species=species_of(potential.module),
        cell_gradients=potential.cell_gradients,
        capacity=None if dynamic else sizes_of(example),
        content=content_of(traced),
    )
    device = example["pos"].device
    key = _cache.key_of(metadata, options(device)) if job.cache else ""
    if key and (entry := _cache.find(key)):
        with progress.stage("checking the package from the cache"):
            shutil.copyfile(entry, job.temporary)
            try:
                references.compare(aoti_load_package(str(job.temporary)))
                return
            except (DifferentError, RuntimeError):  # made under other circumstances: made anew
                entry.unlink(missing_ok=True)
    with progress.stage("exporting"):
        program = export_graph(
            potential.name, traced, example, potential.outputs(), dynamic=dynamic
        )
    with progress.stage("compiling (tens of seconds)"):
        build(potential.name, program, job.temporary, metadata, device)
    with progress.stage(f"checking {len(references.cases)} graphs against the module"):
        references.compare(aoti_load_package(str(job.temporary)))
    if key:
        _cache.keep(key, job.temporary)


def _cases(job: _Job, traced: Traced, *, dynamic: bool) -> list[Case]:
    if not dynamic:
        return static_cases(job.example, job.cutoff)
    cases = dynamic_cases(job.example, job.cutoff)
    for sizes in traced.excluded:
        text = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        graph = resized(job.example, {**sizes_of(job.example), **sizes}, job.cutoff)
        cases.append(Case(f"a graph of {text}", graph))
    return cases


def _of_distinct_sizes(graph: Graph) -> Graph:
    """Zeros in shapes near the graph's, each axis of another length: what tracing has to see."""
    taken: set[int] = set()
    sizes: Sizes = {}
    for name, least in ((B, 5), (N, 11), (E, 13)):
        size = max(least, sizes_of(graph)[name])
        while size in taken or any(size % k == 0 for k in range(2, int(size**0.5) + 1)):
            size += 1
        taken.add(size)
        sizes[name] = size
    return {key: graph[key].new_zeros(shape_of(form, sizes)) for key, form in INPUTS.items()}


def species_of(module: torch.nn.Module) -> list[int] | None:
    """The atomic numbers that a module knows, from its attribute `species` or `atomic_numbers`."""
    for name in ("species", "atomic_numbers"):
        value = getattr(module, name, None)
        if isinstance(value, torch.Tensor):
            value = value.reshape(-1).tolist()
        numbers = value if isinstance(value, list | tuple) else []
        if numbers and all(type(number) is int and number > 0 for number in numbers):
            return sorted(set(numbers))
    return None


def _checked_device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(_device(repr(device))) from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(_device(repr(str(place))))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(_device(f"{str(place)!r}, which torch cannot use here"))
    return place


def _device(got: str) -> str:
    return f"torchcall: compile: device: expected 'cpu' or 'cuda', got {got}"


def _checked_path(path: str | Path) -> Path:
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
    """A file beside the target; made first, so that nobody waits a minute for an error."""
    with contextlib.ExitStack() as stack:
        try:
            temporary = stack.enter_context(_cache.temporary_beside(target))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            kind = type(error) if isinstance(error, OSError) else ValueError
            raise kind(
                f"torchcall: compile: path: expected a folder that can be written, got "
                f"{target.parent}: {reason}"
            ) from error
        yield temporary


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Autograd on, autocast off, torch's warnings unseen; all as before at the end."""
    environment = dict(os.environ)
    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=[]),
    ):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            # torch's compiler tells its subprocesses things.
            for name in set(os.environ) - set(environment):
                del os.environ[name]
            os.environ.update(environment)
