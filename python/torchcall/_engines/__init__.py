"""Where models come from: TorchScript, packages and Python, live or in files."""

from pathlib import Path
from typing import Any, Protocol

import torch

from torchcall import _bridge
from torchcall._call.call import Call, EngineCall
from torchcall._engines.archive import is_package
from torchcall._engines.eager import EagerSource
from torchcall._engines.package import PackageSource
from torchcall._engines.script import FileSource, LiveSource


class ModelSource(Protocol):
    """Something that a native model can be made from, again and again.

    Attributes:
        name: what errors call the model: its label and, once it is loaded, its file.
        label: the name of its class or function.
        weights: "shared" with the caller's module, "copied" from it, or the file's "own".
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
        """The file, where there is one."""
        ...

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Makes the native model."""
        ...

    def python_module(self, model: _bridge.Model) -> Any:
        """The model as a Python object, to inspect; of a package, what it states about itself."""
        ...

    def prepare_call(self, model: _bridge.Model, call: Call) -> EngineCall:
        """Settles a call of what `load` returned last."""
        ...


def source_of(module: object, *, share_inputs: bool = False) -> ModelSource:
    """Returns the source for what a user passed as a model.

    Raises:
        TypeError: if it is nothing that can be called.
        FileNotFoundError, ValueError: if it is a path to no usable model, or no model for
            `share_inputs`.
    """
    if callable(module) and not isinstance(
        module, type | torch.jit.ScriptModule | torch.jit.ScriptFunction
    ):
        return EagerSource(module, share_inputs=share_inputs)
    source = _compiled_source(module)
    if share_inputs:
        raise ValueError(
            f"torchcall: {source.name}: share_inputs=True: expected an eager module or function, "
            f"got {source.engine}, which copies only what it must; leave the option out"
        )
    return source


def _compiled_source(module: object) -> ModelSource:
    if isinstance(module, PackageSource):  # read already
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


def unpickle(path: Path) -> object:
    """Loads a pickled model, running whatever code it names.

    Raises:
        TypeError: if the pickle holds no module.
        ValueError: if it does not unpickle, whatever the code that it names raised.
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
