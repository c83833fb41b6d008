"""Models that only Python can run: eager modules, compiled ones, any callable on tensors."""

import math
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torchcall import _bridge
from torchcall._call import Call, IndexCheck
from torchcall._eager_runner import EagerRunner
from torchcall._inference import InferenceError, infer_outputs
from torchcall._replicas import Replicas
from torchcall._tree import Node
from torchcall._untouched import restored, stand_in


class EagerSource:
    """A module or callable of this process. Each call takes the GIL and runs it as it is."""

    path = None
    engine = "eager"

    def __init__(self, module: Callable[..., Any]) -> None:
        self._module = module
        self._replicas = Replicas(module)
        self.name = self.label = _name_of(module)

    @property
    def weights(self) -> str:
        """Whether all calls so far used the caller's own weights."""
        return "copied" if self._replicas.copied else "shared"

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Makes the native model; weights are copied where a call runs on another device.

        Raises:
            ValueError: the options ask for what only TorchScript has, or weights have no data.
        """
        if freeze:
            raise ValueError("freeze=True: expected a TorchScript module, got an eager one")
        self._replicas.forget()
        if isinstance(self._module, torch.nn.Module):
            weights = (*self._module.parameters(), *self._module.buffers())
            if any(weight.is_meta for weight in weights):
                raise ValueError("expected weights that have data, got some on the device 'meta'")
        return _bridge.Model.of_callables(self.name, requires_grad)

    def look_at(self, model: _bridge.Model, call: Call) -> "EagerCall":
        """Settles a call; see `EngineCall`."""
        del model
        return EagerCall(self._replicas, call)


# Inputs of fewer bytes are always copied: it costs next to nothing, and whatever the model does to
# them cannot reach the caller.
_SMALL = 1 << 20


class EagerCall:
    """A call of a Python callable.

    Where the outputs are not known, it is followed once with fake tensors. That tells which inputs
    are written to in place, too. Those, small ones, and all where it cannot be told, are copied for
    each call.
    """

    def __init__(self, replicas: Replicas, call: Call) -> None:
        self._replicas = replicas
        self._call = call
        self._error: InferenceError | None = None
        self._outputs: Any = None
        self.arguments: list[Node] = []
        self.index_checks: list[IndexCheck] = []
        self.device: str | None = None
        written = set(range(len(call.arrays)))
        if not call.outputs_known:
            written = self._follow()
        self.copies = [
            k in written or _bytes(call.specs[i]) < _SMALL for k, i in enumerate(call.arrays)
        ]

    def _follow(self) -> set[int]:
        written: set[int] = set()
        args, kwargs = self._call.as_the_model_sees_it()
        module = self._replicas.to_follow()
        try:
            with _without_compilation(), restored(module):
                self._outputs = infer_outputs(
                    lambda: stand_in(module),
                    args,
                    kwargs,
                    requires_grad=self._call.requires_grad,
                    written=written,
                )
        except InferenceError as error:
            self._error = error
            return set(range(len(self._call.arrays)))
        return written

    def infer_outputs(self) -> Any:
        """What following it found.

        Raises:
            InferenceError: it cannot be followed.
        """
        if self._error is not None:
            raise self._error
        return self._outputs

    def results(self, outputs: Any) -> list[Node]:
        """Nothing: the runner itself walks what the callable returns."""
        del outputs
        return []

    def callable(self, outputs: Any, n_lengths: int) -> EagerRunner:
        """What runs the module."""
        return EagerRunner(self._replicas, self._call, outputs, n_lengths)


def _name_of(module: Callable[..., Any]) -> str:
    original = getattr(module, "_orig_mod", None)  # of torch.compile
    if isinstance(original, torch.nn.Module):
        return type(original).__name__
    if isinstance(module, torch.nn.Module):
        return type(module).__name__
    return str(getattr(module, "__name__", type(module).__name__))


def _bytes(spec: Any) -> int:
    return math.prod(spec.shape) * spec.dtype.itemsize


def _without_compilation() -> AbstractContextManager[Any]:
    """Runs uncompiled what torch.compile compiled; importing its room takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
