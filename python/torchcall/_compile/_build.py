"""From a graph of operators to a package, with torch's exporter and compiler."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.exc import UserError
from torch._guards import detect_fake_mode
from torch._inductor import aoti_compile_and_package
from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental import _config

from torchcall._compile._errors import CompileError, ToolchainError, cannot_export, message_of
from torchcall._compile._form import INPUTS, MINIMUM, Graph
from torchcall._compile._trace import SpecialisedError, Traced
from torchcall._engines.package_file import METADATA_KEY


class _OfDicts(torch.nn.Module):
    """A function of tensors in order as a function of one dict, which is a package's argument."""

    def __init__(self, flat: torch.fx.GraphModule, outputs: list[str]) -> None:
        super().__init__()
        self.flat = flat
        self.outputs = outputs

    def forward(self, input: Graph) -> dict[str, torch.Tensor]:
        return dict(zip(self.outputs, self.flat(*[input[key] for key in INPUTS]), strict=True))


def export_graph(
    name: str, traced: Traced, example: Graph, outputs: list[str], *, dynamic: bool
) -> ExportedProgram:
    """The graph as an exported program.

    Raises:
        SpecialisedError: `dynamic`, and torch's exporter finds that a size cannot be a symbol.
        CompileError: the graph cannot be exported.
    """
    shapes: Any = None
    if dynamic:
        dims = {axis: Dim(axis, min=least) for axis, least in MINIMUM.items()}
        shapes = {
            key: {i: dims[n] for i, n in enumerate(form) if isinstance(n, str)}
            for key, form in INPUTS.items()
        }
    try:
        program = export(
            _OfDicts(traced.module, outputs), (dict(example),), dynamic_shapes=shapes and (shapes,)
        )
    except UserError as error:
        if dynamic:
            raise SpecialisedError(str(error).strip().splitlines()[0]) from error
        raise cannot_export(name, "exported", error) from error
    except Exception as error:
        raise cannot_export(name, "exported", error) from error
    written = program.graph_signature.user_inputs_to_mutate
    if written:
        raise CompileError(
            f"torchcall: {name}: compile: expected a module that leaves its input as it is, got "
            f"one that writes to {', '.join(sorted(written.values()))} for some shapes only; give "
            "it copies (.clone())"
        )
    return program


def content_of(traced: Traced) -> str:
    """SHA-256 of the graph's operators and of its constants: another model, another text."""
    digest = hashlib.sha256()
    for path, module in traced.module.named_modules():
        if isinstance(module, torch.fx.GraphModule):
            digest.update(f"{path}\n{module.graph}\n".encode())
    tensors = {**traced.module.state_dict(), **_plain_tensors(traced.module)}
    for name, tensor in sorted(tensors.items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Constants that tracing put on the module as attributes."""
    found: dict[str, torch.Tensor] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                found[f"{path}.{name}"] = value
    return found


def options(device: torch.device) -> dict[str, Any]:
    """What torch's compiler is told, beside the metadata."""
    if device.type != "cpu":
        return {}
    return {
        # No pool of worker processes, which would outlive the compilation.
        "compile_threads": 1,
        # One thread needs no parallel regions and no atomic sums; more are counted at run time.
        "cpp.threads": 1 if torch.get_num_threads() == 1 else -1,
        # torch's 512 starts threads for loops that end before they have started.
        "cpp.min_chunk_size": 4096,
    }


@contextlib.contextmanager
def _threads_of_the_machine() -> Iterator[None]:
    """For any other number, torch's compiler makes the number a constant of the package."""
    before, cores = torch.get_num_threads(), os.cpu_count()
    if before in (1, cores) or cores is None:
        yield
        return
    torch.set_num_threads(cores)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _decisions(program: ExportedProgram) -> list[Any]:
    """What was decided by the sizes of the program's example so far."""
    values = [node.meta["val"] for node in program.graph.nodes if "val" in node.meta]
    mode = detect_fake_mode(values)
    return list(mode.shape_env.guards) if mode and mode.shape_env else []


def build(
    name: str, program: ExportedProgram, path: Path, metadata: dict[str, Any], device: torch.device
) -> None:
    """Compiles the program into a package.

    Raises:
        SpecialisedError: the compiler chose code that is right for some sizes only.
        CompileError: there is no C++ compiler, or an operator or generated code does not compile.
    """
    before = len(_decisions(program))
    configs = {
        **options(device),
        "aot_inductor.metadata": {METADATA_KEY: json.dumps(metadata)},
    }
    try:
        # With the flag, choices between equivalent operators do not narrow what sizes may be.
        symbols: Any = _config
        with _threads_of_the_machine(), symbols.patch(backed_size_oblivious=True):
            aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
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
                f"torchcall: {name}: compile: the C++ compiler refuses the generated code\n"
                f"{message_of(cause)}"
            ) from error
        raise cannot_export(name, "compiled", error) from error
    if decisions := _decisions(program)[before:]:
        first = decisions[0]
        raise SpecialisedError(f"torch's compiler decides by {first.expr} {first.sloc}")
