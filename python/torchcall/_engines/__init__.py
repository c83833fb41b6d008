"""Selects the engine for what a user passes as a model."""

from pathlib import Path
from typing import Any, Protocol

import torch

from torchcall import _bridge
from torchcall._call.call import Call, EngineCall
from torchcall._call.plan import PlanSpec
from torchcall._engines.archive import is_package
from torchcall._engines.eager import EagerSource
from torchcall._engines.functional import EagerFunctional, ScriptFunctional
from torchcall._engines.package import PackageSource
from torchcall._engines.script import FileSource, LiveSource


class ModelSource(Protocol):
    """A model as the user passed it, from which native models are loaded.

    Attributes:
        name: what errors call the model: its label and, for a loaded file, the file's name.
        label: the name of its class or function.
        weights: "shared" with the caller's module, "copied" from it, or "own" (the file's).
        engine: "TorchScript", "AOTInductor" or "eager".
    """

    name: str
    label: str
    engine: str

    @property
    def weights(self) -> str:
        """See above."""
        ...

    @property
    def path(self) -> Path | None:
        """The model's file, or None."""
        ...

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Makes the native model."""
        ...

    def python_module(self, model: _bridge.Model) -> Any:
        """The model as a Python object, to inspect; for a package, `user` of its metadata."""
        ...

    def prepare_call(self, model: _bridge.Model, call: Call) -> EngineCall:
        """Checks a call of `model`, which `load` returned last, and plans it."""
        ...


def source_of(module: object, *, share_inputs: bool = False) -> ModelSource:
    """The source of a model.

    Raises:
        TypeError: it is neither a path nor callable.
        FileNotFoundError, ValueError: the file does not exist or is not a usable model, or the
            engine does not support `share_inputs`.
    """
    if isinstance(module, EagerFunctional):
        return module
    if callable(module) and not isinstance(
        module, type | torch.jit.ScriptModule | torch.jit.ScriptFunction
    ):
        return EagerSource(module, share_inputs=share_inputs)
    source = _compiled_source(module)
    if share_inputs:
        raise ValueError(
            f"torchcall: {source.name}: share_inputs=True: expected an eager module or function, "
            f"got {source.engine}, which copies inputs only where necessary; leave the option out"
        )
    return source


def _compiled_source(module: object) -> ModelSource:
    if isinstance(module, PackageSource | ScriptFunctional):  # already read
        return module
    if isinstance(module, str | Path):
        path = Path(module)
        return PackageSource(path) if is_package(path) else FileSource(path)
    if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
        return LiveSource(module)
    got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
    raise TypeError(
        "torchcall: model: expected a torch.nn.Module, a TorchScript module or function, a Python "
        f"callable on tensors, or a path to an archive or package, got {got}"
    )


def check_sizes(source: ModelSource, spec: PlanSpec) -> None:
    """Checks the sizes of a call that was planned when they were symbolic.

    Raises:
        ValueError: the model is a package, which does not take them.
    """
    if isinstance(source, PackageSource):
        source.check_sizes(spec)


def unpickle(path: Path) -> object:
    """Loads a pickled model, which runs any code that the pickle names.

    Raises:
        TypeError: the pickle does not contain a module.
        ValueError: unpickling raised an exception of any type.
    """
    try:
        module = torch.load(path, map_location="cpu", weights_only=False)
    except Exception as error:
        raise ValueError(
            f"torchcall: {path}: expected a pickled module, got a pickle that does not load: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, torch.nn.Module | torch.jit.ScriptFunction):
        raise TypeError(
            f"torchcall: {path}: expected a pickled module, got {type(module).__name__}; a state "
            "dict has weights but no code"
        )
    return module
