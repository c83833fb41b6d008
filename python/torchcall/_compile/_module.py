"""Compiles any module: exports it, finds the axes that may vary, compares the results."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torchcall._call.specs import DTYPE_NAMES
from torchcall._call.tree import check_keys
from torchcall._compile._arguments import example_of, named
from torchcall._compile._build import content_of, shapes_of
from torchcall._compile._compare import DifferentError, compare_results
from torchcall._compile._copy import copy_of, training_note
from torchcall._compile._derivative import VectorJacobianProduct, chosen_inputs
from torchcall._compile._errors import (
    CompileError,
    SpecialisedError,
    ToolchainError,
    Watch,
    cannot_export,
    message_of,
)
from torchcall._compile._metadata import axis, dtype_name, metadata_of, row
from torchcall._compile._progress import Progress
from torchcall._compile._run import Derivative, check_flags, checked_device, produce, writing
from torchcall._undocumented.of_torch import (
    FakeTensorMode,
    trace_fake,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_structure,
    tree_unflatten,
    write_count,
)

_LARGEST = 1 << 62  # a larger maximum of an axis means that there is none


@dataclass(frozen=True)
class Exported:
    """An exported program and the sizes that it supports.

    Attributes:
        program: torch's exported program.
        shapes: per flat input and axis: the size, or the axis' name if its size varies.
        results: likewise for the outputs.
        axes: per name: the metadata's `axis`.
    """

    program: ExportedProgram
    shapes: list[list[int | str]]
    results: list[list[int | str]]
    axes: dict[str, dict[str, int | None]]


class _Positional(torch.nn.Module):
    """A module of positional arguments only. `copies`: it writes to them, so it gets copies."""

    def __init__(self, inner: Callable[..., Any], *, copies: bool) -> None:
        super().__init__()
        self.inner = inner
        self.copies = copies

    def forward(self, *args: Any) -> Any:
        if self.copies:
            args = tree_map(torch.clone, args)
        return self.inner(*args)


def run(
    module: torch.nn.Module,
    path: str | Path,
    *,
    example: Any,
    dynamic: Literal["auto"] | bool,
    device: str | torch.device,
    cache: bool,
    progress: Progress,
    gradients: object = None,
    parallel: bool = False,
) -> Path:
    """`torchcall.compile`, with progress reports."""
    place = checked_device(device)
    check_flags(dynamic, cache=cache, parallel=parallel)
    args = example_of(example, place)
    chosen = chosen_inputs(gradients, args)
    name = type(module).__name__
    with writing(path, place, progress) as temporary:
        with progress.stage("running the module on the example"):
            subject = Subject(module, name, args, place)
            product = subject.product(chosen) if chosen else None
        if note := training_note(module):
            progress.note(note)

        def attempt(exported: Exported) -> None:
            references = subject.references(exported)
            metadata, derivative = subject.metadata(exported), None
            if product is not None:
                with progress.stage(f"differentiating {name}"):
                    graph = product.trace(exported.program)
                    cases = [(what, *product.case(args, x)) for what, args, x in references]
                derivative = Derivative(graph, partial(compare_results, cases))
                metadata["content"] = content_of(graph, structure=metadata["content"])
                metadata["gradients"] = product.gradients
            produce(
                name,
                exported.program,
                metadata,
                place,
                partial(compare_results, references),
                to=temporary,
                cache=cache,
                parallel=parallel,
                progress=progress,
                derivative=derivative,
            )

        if dynamic == "auto":
            progress.note("any sizes first; if that fails, again for the example's")
        if dynamic is not False:
            try:
                with progress.stage(f"exporting {name} for any sizes"):
                    exported = subject.export(dynamic=True)
                attempt(exported)
                _report_fixed(subject, exported, progress)
                return Path(path)
            except ToolchainError:
                raise
            except (SpecialisedError, DifferentError, CompileError) as error:
                if dynamic is True:
                    raise CompileError(
                        f"torchcall: {name}: compile: dynamic: expected a module that supports "
                        f"other sizes than the example's, got one that does not: {error}; "
                        "dynamic=False compiles it for the example's sizes"
                    ) from error
                progress.note(f"fixed to the example's sizes: {str(error).splitlines()[0]}")
        with progress.stage(f"exporting {name} for the example's sizes"):
            exported = subject.export(dynamic=False)
        try:
            attempt(exported)
        except (SpecialisedError, DifferentError) as error:
            raise CompileError(
                f"torchcall: {name}: compile: expected the module's results, got different ones: "
                f"{error}. A model that draws random numbers, or that changes its state between "
                "calls, cannot be compiled"
            ) from error
    return Path(path)


class Subject:
    """A copy of the module to compile, with its example arguments and their results.

    Raises:
        TypeError: it is not an eager module, or it returns leaves that are not tensors.
        ValueError: it returns a dict with keys of two types.
        CompileError: it fails on the example, or changes its buffers.
    """

    def __init__(
        self, module: object, name: str, args: tuple[Any, ...], device: torch.device
    ) -> None:
        self.name = name
        self.args = args
        self._module = copy_of(module, name, None, device)
        given = _copied(args)
        buffers = list(self._module.buffers())
        before, state = _versions(tree_leaves(given)), _versions(buffers)
        try:
            out = self._module(*given)
        except Exception as error:
            raise CompileError(
                f"torchcall: {name}: compile: expected a module that can be called with the "
                f"example, got an error\n{message_of(error)}"
            ) from error
        if _versions(buffers) != state:
            raise CompileError(
                f"torchcall: {name}: compile: expected a module without state, got one that "
                "changes its buffers"
            )
        self.inputs = named("args", args)
        check_keys(out, f"torchcall: {name}: output")
        self.outputs = named("output", out)
        for path, value in self.outputs:
            if not isinstance(value, torch.Tensor):
                raise TypeError(
                    f"torchcall: {name}: {path}: expected a tensor, got {type(value).__name__}"
                )
            if dtype_name(value.dtype) not in DTYPE_NAMES:
                raise TypeError(
                    f"torchcall: {name}: {path}: expected one of the dtypes that JAX and torch "
                    f"share, got {dtype_name(value.dtype)}"
                )
        if not self.outputs:
            raise TypeError(f"torchcall: {name}: output: expected at least one tensor, got none")
        self._positional = _Positional(self._module, copies=_versions(tree_leaves(given)) != before)

    def evaluate(self, args: tuple[Any, ...]) -> list[torch.Tensor]:
        """The module's results, flat."""
        out = self._module(*_copied(args))
        return [leaf.detach() for leaf in tree_leaves(out)]

    def product(self, chosen: list[int]) -> VectorJacobianProduct:
        """The vector-Jacobian product with respect to these flat arguments.

        Raises:
            TypeError, CompileError: the module cannot be differentiated.
        """
        spec = tree_structure(self.args)

        def flat(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
            out = self._positional(*tree_unflatten(tensors, spec))
            return tree_leaves(out)

        return VectorJacobianProduct(self.name, flat, self.inputs, self.outputs, chosen)

    def export(self, *, dynamic: bool) -> Exported:
        """Exports the module. `dynamic`: axes may vary if the module allows it.

        Raises:
            SpecialisedError: with `dynamic`: no axis may vary, or a size depends on another.
            CompileError: the module cannot be exported.
        """
        watch = Watch()
        try:
            with watch:
                program = _exported(self._positional, self.args, dynamic=dynamic)
        except Exception as error:
            if dynamic:
                raise SpecialisedError(message_of(error).splitlines()[0]) from error
            program = self._traced(cannot_export(self.name, "exported", error, watch))
        shapes, results, symbols = shapes_of(program)
        if dynamic and not symbols:
            raise SpecialisedError("the module fixes every axis of its arguments")
        axes = {
            axis_name: axis(max(2, low), high if high < _LARGEST else None)
            for axis_name, (low, high) in symbols.items()
        }
        return Exported(program, shapes, results, axes)

    def _traced(self, failed: CompileError) -> ExportedProgram:
        """Exports the operators of one call, for modules that differentiate in their forward.

        Raises:
            CompileError: `failed`, if tracing fails, too; or tracing succeeds and exporting fails.
        """
        leaves, spec = tree_flatten(self.args)
        structure: list[Any] = []

        def flat(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            out = self._positional(*tree_unflatten(list(tensors), spec))
            results, out_spec = tree_flatten(out)
            structure.append(out_spec)
            return tuple(result.detach() for result in results)

        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)
        fakes = [mode.from_tensor(leaf) for leaf in leaves]
        try:
            with mode, torch.enable_grad():
                graph = trace_fake(flat, fakes)
        except Exception:
            raise failed from failed.__cause__

        def rebuilt(*args: Any) -> Any:
            results = graph(*tree_leaves(args))
            return tree_unflatten(list(results), structure[-1])

        holder = _Positional(rebuilt, copies=False)
        holder.graph = graph
        try:
            return _exported(holder, self.args, dynamic=False)
        except Exception as error:
            raise cannot_export(self.name, "exported", error) from error

    def metadata(self, exported: Exported) -> dict[str, Any]:
        """The package's metadata."""
        program = exported.program
        return metadata_of(
            name=self.name,
            device=tree_leaves(self.args)[0].device,
            content=content_of(
                program.graph_module,
                program.state_dict,
                program.constants,
                structure=str(program.call_spec),
            ),
            inputs=[
                row(path, value.dtype, shape)
                for (path, value), shape in zip(self.inputs, exported.shapes, strict=True)
            ],
            outputs=[
                row(path, value.dtype, shape)
                for (path, value), shape in zip(self.outputs, exported.results, strict=True)
            ],
            axes=exported.axes,
            user={},
        )

    def references(
        self, exported: Exported
    ) -> list[tuple[str, tuple[Any, ...], list[torch.Tensor]]]:
        """The module's results for the example and for longer inputs that repeat its rows.

        With repeated rows, indices stay in range. Longer inputs on which the module fails are
        skipped, because the module does not support them.
        """
        cases = [("the example", self.args)]
        sizes = {
            name: value.shape[i]
            for (_, value), shape in zip(self.inputs, exported.shapes, strict=True)
            for i, name in enumerate(shape)
            if isinstance(name, str)
        }
        for what, longer in (
            ("twice the example's sizes", {name: 2 * n for name, n in sizes.items()}),
            ("longer inputs", {name: n + k for k, (name, n) in enumerate(sizes.items(), 1)}),
        ):
            limits = [(n, exported.axes[name]["maximum"]) for name, n in longer.items()]
            if sizes and all(most is None or n <= most for n, most in limits):
                cases.append((what, self._resized(exported.shapes, longer)))
        results = [(*cases[0], self.evaluate(self.args))]
        for what, args in cases[1:]:
            with contextlib.suppress(Exception):
                results.append((what, args, self.evaluate(args)))
        return results

    def _resized(self, shapes: list[list[int | str]], sizes: dict[str, int]) -> tuple[Any, ...]:
        leaves, spec = tree_flatten(self.args)
        resized = []
        for leaf, shape in zip(leaves, shapes, strict=True):
            for i, name in enumerate(shape):
                if isinstance(name, str):
                    rows = torch.arange(sizes[name], device=leaf.device) % leaf.shape[i]
                    leaf = leaf.index_select(i, rows)
            resized.append(leaf.contiguous())
        return tree_unflatten(resized, spec)


def _exported(module: torch.nn.Module, args: tuple[Any, ...], *, dynamic: bool) -> ExportedProgram:
    shapes: Any = None
    if dynamic:

        def axes(leaf: torch.Tensor) -> dict[int, Any]:
            return {i: Dim.AUTO for i, size in enumerate(leaf.shape) if size >= 2}

        shapes = (tree_map(axes, args),)
    return export(module, args, dynamic_shapes=shapes, strict=False)


def _versions(tensors: list[torch.Tensor]) -> list[int]:
    return [write_count(tensor) for tensor in tensors]


def _copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tree_map(torch.clone, args)


def _report_fixed(subject: Subject, exported: Exported, progress: Progress) -> None:
    for (path, _), shape in zip(subject.inputs, exported.shapes, strict=True):
        if not all(isinstance(size, str) for size in shape):
            progress.note(f"{path}: shape ({', '.join(map(str, shape))}), numbers are fixed sizes")
