"""From a module that returns energies to what `TorchMliap` wraps, for each engine."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from torchcall._compile._copy import inference_copy
from torchcall._engines.names import name_of
from torchcall._undocumented.of_torch import uncompiled
from torchcall.mliap._compile._example import checked_cutoff, checked_dtype
from torchcall.mliap._compile._small import small_example
from torchcall.mliap._energy_torch import weights_dtype, with_gradients
from torchcall.mliap._probe import check_energy
from torchcall.mliap._species import species_of

Engine = Literal["auto", "eager", "script", "package"]
Script = Callable[[torch.nn.Module], torch.jit.ScriptModule]
_ENGINES = ("auto", "eager", "script", "package")
# TorchScript's compiler fails if two threads compile classes of one name.
SCRIPTING = threading.RLock()


class EnergySource(NamedTuple):
    """What to wrap.

    Attributes:
        model: a module with gradients, scripted or not, or the path of a package.
        cutoff: in Å.
        reason: why `engine="auto"` did not select TorchScript; empty otherwise.
    """

    model: torch.nn.Module | Path
    cutoff: float
    reason: str = ""


def energy_source(
    module: object,
    cutoff: Any,
    *,
    dtype: Any,
    engine: Engine,
    example: Any,
    script: Script | None,
    verbose: bool | None = None,
    second_derivatives: bool = False,
    parallel: bool = False,
) -> EnergySource:
    """Prepares a module that returns energies; see `TorchMliap.from_energy` for the arguments.

    `verbose` is whether a compilation reports its stages; None: the default of `Progress`.

    Raises:
        TypeError, ValueError: an argument is wrong, or the module cannot be scripted.
        CompileError: the module cannot be compiled.
    """
    where = "torchcall: TorchMliap.from_energy"
    if engine not in _ENGINES:
        raise ValueError(
            f"{where}: engine: expected 'auto', 'eager', 'script' or 'package', got {engine!r}"
        )
    module = uncompiled(module)
    if not isinstance(module, torch.nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise TypeError(f"{where}: module: expected a torch.nn.Module, got {got}")
    name = name_of(module)
    if cutoff is None:
        cutoff = getattr(module, "cutoff", None)
        if cutoff is None:
            raise ValueError(
                f"torchcall: {name}: cutoff: expected a length in Å, got none, and the module has "
                "no attribute `cutoff`; pass from_energy(module, cutoff) or set it"
            )
    length = checked_cutoff(cutoff, f"torchcall: {name}")
    floats = checked_dtype(dtype, f"torchcall: {name}")
    copied = inference_copy(module)
    if floats is not None:
        copied = copied.to(dtype=floats)
    check_energy(copied, name)
    if engine == "package":
        flags = {"second_derivatives": second_derivatives, "parallel": parallel}
        return EnergySource(_package(module, length, floats, example, verbose, flags), length)
    eager = with_gradients(copied)
    if engine == "eager":
        return EnergySource(eager, length)
    try:
        with SCRIPTING:
            return EnergySource((script or torch.jit.script)(eager), length)
    except Exception as error:
        if engine == "script":
            raise ValueError(
                f"torchcall: {name}: engine='script': expected a module that TorchScript compiles, "
                "got an error. Change the code that it names, or use engine='eager' or "
                f"'package'\n{error}"
            ) from error
        reason = f"TorchScript does not compile the module: {_first_line(error)}"
        return EnergySource(eager, length, reason)


def _package(
    module: torch.nn.Module,
    cutoff: float,
    dtype: torch.dtype | None,
    example: Any,
    verbose: bool | None,
    flags: dict[str, bool],
) -> Path:
    # torch's compiler takes seconds to import: import it only for compilation.
    from torchcall._compile._errors import CompileError, ExportError, ToolchainError
    from torchcall._compile._progress import Progress
    from torchcall.mliap._compile._run import run

    small = example is None
    if small:
        floats = dtype or weights_dtype(module) or torch.get_default_dtype()
        example = small_example(cutoff, species_of(module), floats)
    try:
        return run(
            module,
            None,
            example=example,
            cutoff=cutoff,
            dtype=dtype,
            device="cpu",
            # The capacity of a package for fixed shapes must be the user's choice.
            dynamic=True if small else "auto",
            cache=True,
            progress=Progress(verbose),
            **flags,
        )
    except CompileError as error:
        if not small or isinstance(error, ExportError | ToolchainError):
            raise
        raise CompileError(
            f"{error}\nThis was found on a small structure that torchcall made. Pass "
            "from_energy(…, example=graph), an AtomGraph of your system: the package may then be "
            "compiled for its shapes"
        ) from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)
