"""Compiles an exported program into a package, with torch's compiler."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from filelock import FileLock
from torch.export import ExportedProgram
from torch.fx import GraphModule

from torchcall._compile._errors import (
    CompileError,
    SpecialisedError,
    ToolchainError,
    cannot_export,
    message_of,
)
from torchcall._compile._strides import linear_strides
from torchcall._compile._sums import sums_of_any_size
from torchcall._engines.package_file import DERIVATIVE, METADATA_KEY, MODEL
from torchcall._undocumented.of_compiler import (
    OBLIVIOUS_OF_SIZES,
    CppCompileError,
    InvalidCxxCompiler,
    aot_compile,
    cache_dir,
    package_aoti,
    patched,
)
from torchcall._undocumented.of_torch import FakeTensorMode, detect_fake_mode


def shapes_of(
    program: ExportedProgram,
) -> tuple[list[list[int | str]], list[list[int | str]], dict[str, tuple[int, int]]]:
    """Shapes of inputs and outputs, with names for variable axes, and the range of each axis.

    Raises:
        SpecialisedError: a size is an expression in other sizes, or the program is valid only for
            some of the sizes in the ranges, because the module branches on a size.
    """
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    names: dict[Any, str] = {}

    def shape(name: str, *, known_only: bool) -> list[int | str]:
        result: list[int | str] = []
        for size in values[name].shape:
            expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            if expression.is_Integer:
                result.append(int(expression))
                continue
            if not expression.is_Symbol or (known_only and expression not in names):
                raise SpecialisedError(f"a size depends on other sizes: {expression}")
            result.append(names.setdefault(expression, f"n{len(names)}"))
        return result

    signature = program.graph_signature
    inputs = [shape(str(name), known_only=False) for name in signature.user_inputs]
    outputs = [shape(str(name), known_only=True) for name in signature.user_outputs]
    require_all_sizes(program)
    limits: Any = program.range_constraints
    ranges = {name: (int(limits[s].lower), _upper(limits[s].upper)) for s, name in names.items()}
    return inputs, outputs, ranges


def require_all_sizes(program: ExportedProgram | GraphModule) -> None:
    """Raises SpecialisedError if a guard does not hold for all sizes in the ranges."""
    mode = _fake_mode(program)
    for guard in _guards(program):
        assert mode is not None
        env: Any = mode.shape_env
        # Uses the ranges only: torch would otherwise assume that each guard holds.
        if env.bound_sympy(env.simplify(guard.expr)).lower is not sympy.true:
            raise SpecialisedError(f"the module branches on {guard.expr} {guard.sloc}")


def _upper(limit: Any) -> int:
    return int(limit) if getattr(limit, "is_Integer", False) else sys.maxsize


def content_of(module: torch.nn.Module, *constants: Mapping[str, Any], structure: str = "") -> str:
    """SHA-256 of a graph's operators and constants, which identifies the model."""
    digest = hashlib.sha256(structure.encode())
    for path, part in module.named_modules():
        if isinstance(part, torch.fx.GraphModule):
            digest.update(f"{path}\n{part.graph}\n".encode())
    tensors = {**module.state_dict(), **_plain_tensors(module)}
    for group in constants:
        tensors |= {k: v for k, v in group.items() if isinstance(v, torch.Tensor)}
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Constants that tracing stored as attributes of the module."""
    found: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = value
    return found


def options(device: torch.device, *, parallel: bool) -> dict[str, Any]:
    """Options for torch's compiler, without the metadata.

    Args:
        device: the device to compile for.
        parallel: whether loops on a CPU are divided among threads, whose number is read at run
            time. Sums into rows are then atomic: slower with one thread, and often with several.
    """
    if device.type != "cpu":
        return {}
    return {
        # No pool of worker processes: it would outlive the compilation.
        "compile_threads": 1,
        # 1: no parallel regions and atomic sums. -1: the number of threads is read at run time.
        "cpp.threads": -1 if parallel else 1,
        # With torch's default, 512, starting the threads takes longer than the loop.
        "cpp.min_chunk_size": 4096,
    }


@contextlib.contextmanager
def _threads_of_the_machine() -> Iterator[None]:
    """Sets torch's number of threads to the number of cores.

    torch's compiler makes any other number a constant of the package.
    """
    before, cores = torch.get_num_threads(), os.cpu_count()
    if before == cores or cores is None:
        yield
        return
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def lock_of(content: str) -> FileLock:
    """A lock that lets one process of this machine at a time build a model.

    Files in torch's cache are named by content. The lock belongs to an open file, so it ends with
    the process that has it, however that ends.
    """
    folder = Path(cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"torchcall-{content[:32]}.lock")


def _guards(program: ExportedProgram | GraphModule) -> list[Any]:
    """The guards on sizes that tracing and compilation have added so far."""
    mode = _fake_mode(program)
    return list(mode.shape_env.guards) if mode and mode.shape_env else []


def _fake_mode(program: ExportedProgram | GraphModule) -> FakeTensorMode | None:
    return detect_fake_mode([n.meta["val"] for n in program.graph.nodes if "val" in n.meta])


def _compile(
    programs: dict[str, ExportedProgram | GraphModule], path: str, configs: dict[str, Any]
) -> None:
    """Compiles several programs into one package, under these names."""
    options = {**configs, "aot_inductor.package": True}
    files: dict[str, Any] = {}
    for name, program in programs.items():
        if isinstance(program, ExportedProgram):
            graph: Any = program.module(check_guards=False)
            example: Any = program.example_inputs
            args, kwargs = example
        else:
            graph, args, kwargs = program, program.meta["example"], {}
        files[name] = aot_compile(graph, args, kwargs, options=options)
    package_aoti(path, files)


def build(
    name: str,
    program: ExportedProgram | GraphModule,
    path: Path,
    metadata: dict[str, Any],
    configs: dict[str, Any],
    derivative: GraphModule | None = None,
) -> None:
    """Compiles the program into a package. The caller has the lock of its content.

    Args:
        name: what errors call the module.
        program: an exported program; or a graph of operators with fake tensors as the values of its
            nodes, and examples of its arguments in `meta["example"]`.
        path: the file to write.
        metadata: the package's metadata.
        configs: options for torch's compiler, see `options`.
        derivative: the package's second program, `CompiledDerivative`, in the form of `program`.

    Raises:
        SpecialisedError: the compiler generated code that is valid for some sizes only.
        CompileError: there is no C++ compiler, or an operator or the generated code does not
            compile.
    """
    programs: dict[str, ExportedProgram | GraphModule] = {MODEL: program}
    if derivative is not None:
        programs[DERIVATIVE] = derivative
    before = [len(_guards(each)) for each in programs.values()]
    configs = {
        **configs,
        "aot_inductor.metadata": {METADATA_KEY: json.dumps(metadata)},
        # Precompiling takes longer than it saves in several packages, and 300 MB of disk for each
        # set of flags.
        "aot_inductor.precompile_headers": False,
    }
    try:
        # With the flag, choices between equivalent operators do not restrict the sizes.
        with (
            _threads_of_the_machine(),
            linear_strides(),
            sums_of_any_size(),
            patched(OBLIVIOUS_OF_SIZES, True),
        ):
            _compile(programs, str(path), configs)
    except Exception as error:
        cause = error
        while (inner := getattr(cause, "inner_exception", None)) is not None:
            cause = inner
        if isinstance(cause, InvalidCxxCompiler):
            raise ToolchainError(
                f"torchcall: {name}: compile: expected a C++ compiler (g++, or what the "
                f"environment variable CXX names), got none: {message_of(cause)}"
            ) from error
        if isinstance(cause, CppCompileError):
            raise CompileError(
                f"torchcall: {name}: compile: the C++ compiler failed on the generated code\n"
                f"{message_of(cause)}"
            ) from error
        raise cannot_export(name, "compiled", error) from error
    for each, known in zip(programs.values(), before, strict=True):
        if added := _guards(each)[known:]:
            first = added[0]
            raise SpecialisedError(f"torch's compiler branches on {first.expr} {first.sloc}")
