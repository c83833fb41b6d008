"""The steps of compiling a potential: any shapes first, then those of the example."""

import errno
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from torchcall._compile._build import content_of
from torchcall._compile._cache import find
from torchcall._compile._compare import DifferentError
from torchcall._compile._copy import training_note
from torchcall._compile._errors import CompileError, SpecialisedError, ToolchainError
from torchcall._compile._program import as_program
from torchcall._compile._progress import Progress
from torchcall._compile._run import (
    Derivative,
    caching,
    check_flags,
    checked_device,
    produce,
    writing,
)
from torchcall.mliap._compile._cases import Case, dynamic_cases, resized, static_cases
from torchcall.mliap._compile._derivative import PotentialDerivative
from torchcall.mliap._compile._example import checked_cutoff, checked_dtype, example_tensors
from torchcall.mliap._compile._form import (
    INPUTS,
    B,
    E,
    Graph,
    N,
    Sizes,
    metadata_of,
    shape_of,
    sizes_of,
)
from torchcall.mliap._compile._gradients import PotentialModule, failed_on_example
from torchcall.mliap._compile._references import References, graph_function
from torchcall.mliap._compile._trace import Traced, program_of, trace
from torchcall.mliap._species import species_of


def run(
    module: torch.nn.Module,
    path: str | Path | None,
    *,
    example: Any,
    cutoff: Any,
    dtype: Any,
    device: str | torch.device,
    dynamic: Literal["auto"] | bool,
    cache: bool,
    progress: Progress,
    second_derivatives: bool = False,
    parallel: bool = False,
) -> Path:
    """`torchcall.mliap.compile`, reporting to `progress`.

    With the path None, the package is an entry of the cache, which is returned.

    Raises:
        OSError: also if the cache cannot be written and the path is None.
    """
    length = checked_cutoff(getattr(module, "cutoff", None) if cutoff is None else cutoff)
    floats, place = checked_dtype(dtype), checked_device(device)
    check_flags(dynamic, cache=cache, second_derivatives=second_derivatives, parallel=parallel)
    output = caching(place) if path is None else writing(path, place, progress)
    with output as temporary:
        with progress.stage("running the module on the example"):
            potential = PotentialModule(module, floats, place)
            graph = example_tensors(example, cutoff=length, dtype=floats, device=place)
            try:
                results = potential.inspect(graph)
            except (CompileError, TypeError, ValueError) as error:
                if str(error).startswith("torchcall: "):
                    raise
                raise failed_on_example(potential, error, graph) from error
            except Exception as error:
                raise failed_on_example(potential, error, graph) from error
        if note := training_note(module):
            progress.note(note)
        derivative = None
        if second_derivatives:
            with progress.stage("differentiating it twice on the example"):
                derivative = PotentialDerivative(potential, graph, results)
        key = _write(
            _Job(potential, derivative, graph, length, temporary, cache, parallel, progress),
            dynamic,
        )
        if path is not None:
            return Path(path)
        if (entry := find(key)) is None:
            raise OSError(errno.EIO, "the package could not be stored")
        return entry


class _Job(NamedTuple):
    potential: PotentialModule
    derivative: PotentialDerivative | None
    example: Graph
    cutoff: float
    temporary: Path
    cache: bool
    parallel: bool
    progress: Progress


def _write(job: _Job, dynamic: Literal["auto"] | bool) -> str:
    """Writes the temporary file: for any shapes if possible, else for the example's sizes.

    Returns:
        The key of the package in the cache.
    """
    name = job.potential.name
    if dynamic == "auto":
        job.progress.note("any shapes first; if that fails, again for the example's sizes")
    if dynamic is not False:
        try:
            return _attempt(job, dynamic=True)
        except ToolchainError:
            raise
        except (SpecialisedError, DifferentError, CompileError) as error:
            if dynamic is True:
                if isinstance(error, CompileError):
                    raise
                raise CompileError(
                    f"torchcall: {name}: compile: dynamic: expected a module that serves any "
                    f"numbers of atoms, edges and systems, got one that does not: {error}; "
                    "dynamic=False compiles it for the example's padded sizes"
                ) from error
            sizes = sizes_of(job.example)
            job.progress.note(f"cannot compile for any shapes: {str(error).splitlines()[0]}")
            job.progress.note(
                f"compiling for a capacity of {sizes[N]} atoms, {sizes[E]} edges and {sizes[B]} "
                "systems, phantoms included"
            )
    try:
        return _attempt(job, dynamic=False)
    except (SpecialisedError, DifferentError) as error:
        raise CompileError(
            f"torchcall: {name}: compile: expected the module's results, got different "
            f"ones: {error}. A model that draws random numbers, or that changes its state between "
            "calls, cannot be compiled"
        ) from error


def _attempt(job: _Job, *, dynamic: bool) -> str:
    potential, progress = job.potential, job.progress
    shapes = "any shapes" if dynamic else "fixed shapes"
    with progress.stage(f"tracing {potential.name} for {shapes}"):
        example = _of_distinct_sizes(job.example) if dynamic else job.example
        traced = trace(potential, example, dynamic=dynamic)
        references = References(potential, _cases(job, traced, dynamic=dynamic))
        references.compare(graph_function(traced.module, potential.outputs()))
    second = job.derivative and _second_program(job, job.derivative, example, dynamic=dynamic)
    device = example["pos"].device
    metadata = metadata_of(
        name=potential.name,
        device=device,
        dtype=potential.dtype,
        cutoff=job.cutoff,
        species=species_of(potential.module),
        cell_gradients=potential.cell_gradients,
        capacity=None if dynamic else sizes_of(example),
        content=content_of(traced.module),
    )
    if job.derivative is not None and second is not None:
        metadata["content"] = content_of(second.program, structure=metadata["content"])
        metadata["gradients"] = job.derivative.product.gradients
    return produce(
        potential.name,
        program_of(traced, example, potential.outputs()),
        metadata,
        device,
        references.compare,
        to=job.temporary,
        cache=job.cache,
        parallel=job.parallel,
        progress=progress,
        derivative=second,
    )


def _second_program(
    job: _Job, derivative: PotentialDerivative, example: Graph, *, dynamic: bool
) -> Derivative:
    shapes = "any shapes" if dynamic else "fixed shapes"
    with job.progress.stage(f"tracing the second derivatives for {shapes}"):
        traced = trace(job.potential, example, dynamic=dynamic, derivative=derivative)
        references = References(derivative, _cases(job, traced, dynamic=dynamic))
        references.compare(derivative.function(traced.module))
    given = derivative.given(example)
    names = [f"input{k}" for k in range(len(given))]
    return Derivative(
        as_program(traced.module, names, given, tuple(derivative.keys)),
        lambda program: references.compare(derivative.function(program)),
    )


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
    """Zeros in shapes near the graph's; all axes differ in length, as `trace` requires."""
    taken: set[int] = set()
    sizes: Sizes = {}
    for name, least in ((B, 5), (N, 11), (E, 13)):
        size = max(least, sizes_of(graph)[name])
        while size in taken or any(size % k == 0 for k in range(2, int(size**0.5) + 1)):
            size += 1
        taken.add(size)
        sizes[name] = size
    return {key: graph[key].new_zeros(shape_of(form, sizes)) for key, form in INPUTS.items()}
