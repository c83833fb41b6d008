"""TorchScript models: modules of this process and archives."""

import copy
import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchcall import _bridge
from torchcall._call.call import Call, CompiledDerivative, IndexCheck
from torchcall._call.specs import is_static
from torchcall._call.tree import TENSOR, TUPLE, Node, UnsupportedNodeError, encode, scalar_node
from torchcall._engines.archive import TORCHSCRIPT, check_archive
from torchcall._engines.content import FileContent, archive_digest
from torchcall._engines.fakes import infer_outputs
from torchcall._engines.names import name_of
from torchcall._undocumented.of_torch import cpp_module


class ScriptSource:
    """A TorchScript model."""

    engine = "TorchScript"
    weights = "own"

    def python_module(self, model: _bridge.Model) -> Any:
        """The model as a Python object, for tracing with fake tensors."""
        raise NotImplementedError

    def prepare_call(self, model: _bridge.Model, call: Call) -> "ScriptCall":
        """Checks and plans a call."""
        return ScriptCall(self, model, call)


class LiveSource(ScriptSource):
    """A `ScriptModule` or script function of this process. It is serialised only if necessary."""

    path = None

    def __init__(self, module: torch.jit.ScriptModule | torch.jit.ScriptFunction) -> None:
        self._module = module
        self.weights = "shared"
        self.name = name_of(module)
        self.label = self.name

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Makes the native model."""
        cpp: Any = self._module
        if isinstance(cpp, torch.jit.ScriptModule):
            cpp = cpp_module(cpp)
        native = _bridge.Model.from_live(cpp, freeze, requires_grad)
        if native is None:
            self.weights = "copied"
            buffer = io.BytesIO()
            torch.jit.save(self._module, buffer)
            native = _bridge.Model.from_bytes(buffer.getvalue(), freeze, requires_grad)
        if freeze:  # the frozen copy's weights cannot change
            native.content = archive_digest(native.serialize())
        return native

    def python_module(self, model: _bridge.Model) -> Any:
        """The module itself."""
        del model
        return self._module


class FileSource(ScriptSource):
    """A TorchScript archive, loaded in C++."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._verified: FileContent | None = self._verify(path)  # None after it was loaded
        self.name = self.label = path.name

    @property
    def path(self) -> Path | None:
        """The file."""
        return self._path

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Makes the native model."""
        file = self._verified or self._verify(self._path)
        self._verified = None
        try:
            model = _bridge.Model.from_file(str(self._path), freeze, requires_grad)
        except ValueError as error:
            raise ValueError(f"the TorchScript archive does not load: {error}") from error
        file.require_unchanged()
        model.file = file
        self.label = model.name
        self.name = f"{self.label} ({self._path.name})"
        return model

    def _verify(self, path: Path) -> FileContent:
        file = FileContent(path)
        check_archive(path, TORCHSCRIPT)
        return file

    def python_module(self, model: _bridge.Model) -> Any:
        """A copy of the loaded model, because the file may have been changed or deleted."""
        return torch.jit.load(io.BytesIO(model.serialize()), map_location="cpu")


class ScriptCall:
    """A call of a TorchScript model. C++ finds the inputs that the model writes to.

    Args:
        source: where to find the model in Python.
        model: the native model.
        call: its arguments.
        parameters: see `PlanSpec`; these operands precede those of `call`.
    """

    def __init__(
        self,
        source: ScriptSource,
        model: _bridge.Model,
        call: Call,
        parameters: list[list[str]] | None = None,
    ) -> None:
        self._source = source
        self._model = model
        self._call = call
        self.parameters = parameters or []
        first = len(self.parameters)
        self.arguments = _arguments(call, first)
        n_inputs = first + len(call.arrays)
        self.copies = [False] * n_inputs
        self.index_checks: list[IndexCheck] = []
        self.device: str | None = None
        self.no_derivatives = ""
        self.derivative: CompiledDerivative | None = None
        model.check_arguments(self.arguments, n_inputs)

    def infer_outputs(self, change: Callable[[Any], Any] | None = None) -> Any:
        """The outputs that tracing the model with fake tensors finds.

        Raises:
            InferenceError: it cannot be traced.
        """

        def load() -> Any:
            module = self._source.python_module(self._model)
            # Fake tensors are on the CPU, and the caller's module must not store any.
            if _is_off_cpu(module):
                module = copy.deepcopy(module).cpu()
            elif self._model.changes_state:
                module = copy.deepcopy(module)
            return module

        args, kwargs = self._call.cast_arguments()
        return infer_outputs(
            load, args, kwargs, requires_grad=self._call.requires_grad, change=change
        )

    def results(self, outputs: Any) -> list[Node]:
        """The structure of `outputs`; the model returns all of it."""
        slot = itertools.count()

        def node(leaf: Any) -> Node:
            return scalar_node(None) if leaf is None else (TENSOR, next(slot))

        return list(encode(outputs, node, "output "))

    def eager_runner(self, outputs: Any, n_lengths: int) -> None:
        """None: calls run no Python."""
        del outputs, n_lengths


def _is_off_cpu(module: Any) -> bool:
    """Whether any weight is on another device than the CPU."""
    if not isinstance(module, torch.nn.Module):
        return False
    return any(t.device.type != "cpu" for t in (*module.parameters(), *module.buffers()))


def _arguments(call: Call, first: int) -> list[Node]:
    """The arguments, whose tensors are the inputs from `first` on."""
    for name, spec in zip(call.names, call.specs, strict=True):
        try:
            _ = is_static(spec) and scalar_node(spec)
        except UnsupportedNodeError as error:
            raise UnsupportedNodeError(f"{name}: {error}") from None
    position = itertools.count(first)
    remaining = iter(call.specs)

    def node(_: Any) -> Node:
        spec = next(remaining)
        return scalar_node(spec) if is_static(spec) else (TENSOR, next(position))

    args, kwargs = call.arguments()
    return [
        (TUPLE, 2),
        *encode(list(args), node, "operand args"),
        *encode(kwargs, node, "operand kwargs"),
    ]
