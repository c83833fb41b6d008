"""The eager engine: modules, compiled modules and other callables, run in Python."""

import copy
import functools
import math
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import torch

from torchcall import _bridge
from torchcall._call.call import Call, CompiledDerivative, IndexCheck
from torchcall._call.specs import is_static, torch_dtype
from torchcall._call.tree import Node, items_of
from torchcall._cuda import observation as _observation
from torchcall._engines.derivatives import (
    Derivatives,
    Differentiable,
    GradientError,
    detach_state,
)
from torchcall._engines.fakes import infer_outputs
from torchcall._engines.isolation import restored, tracing_copy
from torchcall._engines.names import name_of
from torchcall._engines.replicas import Replicas
from torchcall._undocumented.of_torch import is_compiler_loaded


class _ResultError(Exception):
    """The callable's result has another structure than planned."""


class EagerRunner:
    """Runs the calls of one plan. Each call gets new tensors.

    Args:
        replicas: the callable on each device.
        call: the call's arguments.
        outputs: pytree of `jax.ShapeDtypeStruct` and None that the callable must return.
        n_lengths: number of lengths, operands after the call's own that the callable does not get.
        shared: per array, whether the callable's tensor refers to XLA's memory.
        n_parameters: number of arrays, the first ones, that are parameters of a module.
    """

    def __init__(
        self,
        replicas: Replicas,
        call: Call,
        outputs: Any,
        n_lengths: int,
        shared: list[bool],
        n_parameters: int = 0,
    ) -> None:
        self._replicas = replicas
        self._treedef = call.treedef
        self._outputs = outputs
        self._selects = call.selects_outputs
        self._n_lengths = n_lengths
        self._shapes_and_dtypes = [
            (
                (0,) if shared[k] else call.specs[i].shape,
                torch_dtype(call.casts[i] or str(call.specs[i].dtype)),
            )
            for k, i in enumerate(call.arrays)
        ]
        # The static arguments, and None in the place of each tensor.
        self._template = [spec if is_static(spec) else None for spec in call.specs]
        self._slots = call.arrays
        self._derivatives: Derivatives | None = None
        self._shares = shared
        self._vmaps: list[tuple[int | None, ...]] = []  # outermost first
        self._strict = call.requires_grad
        self._n_parameters = n_parameters
        given = [(call.specs[i], call.names[i]) for i in call.arrays]
        self._operands = [
            Differentiable(spec.shape, torch_dtype(str(spec.dtype)), name) for spec, name in given
        ] + [Differentiable((), torch.int32, "a length")] * n_lengths
        args, kwargs = call.arguments()
        self._plain = not kwargs and all(isinstance(x, jax.ShapeDtypeStruct) for x in args)
        self._one_result = isinstance(outputs, jax.ShapeDtypeStruct)

    def derivative(
        self, cotangents: list[Any], level: tuple[list[int], list[int], bool]
    ) -> "EagerRunner":
        """The runner of a plan's vector-Jacobian product.

        Args:
            cotangents: their specifications, `Operand`s of `_call/plan.py`.
            level: (inputs, outputs, keeps_outputs), see `TcDerivative` of csrc/engine.h.
        """
        result = copy.copy(self)
        known = self._derivatives or Derivatives(self._operands, self._strict, self._n_parameters)
        operands = [
            Differentiable(tuple(x.shape), torch_dtype(x.dtype), x.name) for x in cotangents
        ]
        result._derivatives = known.then(operands, *level)
        return result

    def mapped(
        self, shapes: list[list[int]], has_axis: list[bool], by_torch: bool
    ) -> "EagerRunner":
        """The runner of calls with a mapped axis, which is the first axis of operands and outputs.

        Args:
            shapes: of all operands.
            has_axis: per operand, whether it has the axis.
            by_torch: whether `torch.func.vmap` maps the callable. Otherwise it gets the axis.
        """
        result = copy.copy(self)
        n = len(self._shapes_and_dtypes)
        result._shapes_and_dtypes = [
            ((0,) if shared else tuple(shape), dtype)
            for (_, dtype), shape, shared in zip(
                self._shapes_and_dtypes, shapes[:n], self._shares, strict=True
            )
        ]
        if by_torch:
            result._vmaps = [tuple(0 if has else None for has in has_axis[:n]), *self._vmaps]
        if self._derivatives is not None:
            given = n + self._n_lengths
            result._derivatives = self._derivatives.reshaped(shapes[given:])
        return result

    def bind(
        self, device: str
    ) -> tuple[Callable[..., Any], list[torch.Tensor | None], Callable[[list[Any]], Any]]:
        """The functions and templates with which all calls on a device run.

        Returns:
            `make`, one template per operand (None for a length), and `run`. A call makes a tensor
            from each template and passes the list of tensors to `run`, which returns the model's
            flat results, or an error text.
        """
        templates = [_template(shape, dtype, device) for shape, dtype in self._shapes_and_dtypes]
        run = functools.partial(self._run, functools.partial(self._replicas.on, device))
        if device != "cpu":
            run = functools.partial(self._enqueue, device)
        templates += [None] * self._n_lengths
        if self._derivatives is not None:
            templates += [_template(x.shape, x.dtype, device) for x in self._derivatives.cotangents]
        return torch.empty_like, templates, run

    def held(self, device: str) -> object:
        """The tensors that a CUDA graph captured from a call on the device reads."""
        return self._replicas.tensors_read_on(device)

    def _enqueue(self, device: str, tensors: list[Any]) -> tuple[torch.Tensor, ...] | str:
        """`_run` for devices on which calls return before their work is finished."""
        used: list[Callable[..., Any]] = []

        def get_module() -> Callable[..., Any]:
            used.append(self._replicas.on(device))
            return used[0]

        try:
            return self._run(get_module, tensors)
        finally:
            for module in used:
                self._replicas.retain_if_replaced(device, module)

    def _run(
        self, get_module: Callable[[], Callable[..., Any]], tensors: list[Any]
    ) -> tuple[torch.Tensor, ...] | str:
        """Calls the module that `get_module` returns. Returns its flat results or an error text.

        Each call makes new containers, because a model may change them.
        """
        try:
            if self._derivatives is None:
                return self._result(get_module, tensors)
            leaves = self._derivatives.leaves(tensors)
            given = self._derivatives.model_inputs(leaves)
            try:
                with self._derivatives.inside(leaves):
                    outputs = self._result(get_module, given)
                return self._derivatives.gradients(outputs, leaves)
            finally:
                detach_state(get_module())
        except (_ResultError, GradientError) as error:
            return str(error)
        except Exception as error:
            return _error_text(error)

    def _result(
        self, get_module: Callable[[], Callable[..., Any]], tensors: list[Any]
    ) -> tuple[torch.Tensor, ...]:
        module = get_module()
        observation = _observation.current  # read once: another thread may end it
        if observation is not None:
            observation.see(module)
        if self._vmaps:
            function = functools.partial(self._flat_result, module)
            for in_dims in reversed(self._vmaps):
                function = torch.func.vmap(function, in_dims=in_dims)
            return function(*tensors[: len(self._slots)])
        return self._flat_result(module, *tensors)

    def _flat_result(self, module: Callable[..., Any], *tensors: Any) -> tuple[torch.Tensor, ...]:
        if self._plain:
            result = module(*tensors[: len(self._slots)])
        else:
            leaves = self._template.copy()
            for slot, tensor in zip(self._slots, tensors, strict=False):
                leaves[slot] = tensor
            args, kwargs = self._treedef.unflatten(leaves)
            result = module(*args, **kwargs)
        if self._one_result and isinstance(result, torch.Tensor):
            return (result,)
        flat: list[torch.Tensor] = []
        self._flatten(result, self._outputs, "", flat)
        return tuple(flat)

    def _flatten(self, value: Any, expected: Any, path: str, flat: list[torch.Tensor]) -> None:
        if isinstance(expected, jax.ShapeDtypeStruct):
            if not isinstance(value, torch.Tensor):
                raise _mismatch(path, "a tensor", _kind(value))
            flat.append(value)
        elif expected is None:
            if value is not None:
                raise _mismatch(path, "None", _kind(value))
        elif isinstance(expected, dict):
            self._flatten_dict(value, expected, path, flat)
        else:
            kind = list if isinstance(expected, list) else tuple
            if not isinstance(value, kind) or len(value) != len(expected):
                what = f"a {kind.__name__} of {len(expected)}"
                raise _mismatch(path, what, _kind(value))
            for i, (item, spec) in enumerate(zip(value, expected, strict=True)):
                self._flatten(item, spec, f"{path}[{i}]", flat)

    def _flatten_dict(
        self, value: Any, expected: dict[Any, Any], path: str, flat: list[torch.Tensor]
    ) -> None:
        if not isinstance(value, dict):
            raise _mismatch(path, "a dict", _kind(value))
        for key, spec in items_of(expected):
            if key not in value:
                raise _mismatch(f"{path}[{key!r}]", "this key", _kind(value))
            self._flatten(value[key], spec, f"{path}[{key!r}]", flat)
        if not self._selects and len(value) != len(expected):
            raise _mismatch(path, f"{len(expected)} keys", _kind(value))


def _template(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> torch.Tensor:
    """A tensor of at most one element from which `torch.empty_like` makes inputs of this shape."""
    if math.prod(shape) <= 1:
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.empty((), dtype=dtype, device=device).expand(shape)


def _mismatch(path: str, expected: str, got: str) -> _ResultError:
    return _ResultError(f"output{' ' if path else ''}{path}: expected {expected}, got {got}")


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"a dict with keys [{', '.join(map(repr, value))}]"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else type(value).__name__


def _error_text(error: BaseException) -> str:
    """The exception and its traceback inside the callable."""
    frames = "".join(traceback.format_list(traceback.extract_tb(error.__traceback__)[1:]))
    text = "".join(traceback.format_exception_only(error)).strip()
    return f"raised {text}\n\nTraceback (most recent call last):\n{frames}".rstrip()


class EagerSource:
    """A module or another callable of this process. Each call acquires the GIL and runs it.

    Args:
        module: the callable.
        share_inputs: whether its inputs refer to XLA's memory instead of copies.
    """

    path = None
    engine = "eager"

    def __init__(self, module: Callable[..., Any], *, share_inputs: bool = False) -> None:
        self._module = module
        self._replicas = Replicas(module)
        self._share_inputs = share_inputs
        self.name = self.label = name_of(module)

    @property
    def weights(self) -> str:
        """Whether all calls so far used the caller's weights ("shared") or not ("copied")."""
        return "copied" if self._replicas.copied else "shared"

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Makes the native model. Calls on another device copy the weights later.

        Raises:
            ValueError: `freeze`, which only TorchScript supports, or weights without data.
        """
        if freeze:
            raise ValueError("freeze=True: expected a TorchScript module, got an eager one")
        self._replicas.release_copies()
        if isinstance(self._module, torch.nn.Module):
            weights = (*self._module.parameters(), *self._module.buffers())
            if any(weight.is_meta for weight in weights):
                raise ValueError("expected weights that have data, got some on the device 'meta'")
        return _bridge.Model.of_eager(self.name, requires_grad)

    def python_module(self, model: _bridge.Model) -> Any:
        """The caller's module."""
        del model
        return self._module

    def prepare_call(self, model: _bridge.Model, call: Call) -> "EagerCall":
        """Plans a call."""
        del model
        return EagerCall(self._replicas, call, self._share_inputs)


class EagerCall:
    """A call of an eager module or another callable."""

    def __init__(self, replicas: Replicas, call: Call, share_inputs: bool) -> None:
        self._replicas = replicas
        self._call = call
        self.arguments: list[Node] = []
        self.index_checks: list[IndexCheck] = []
        self.parameters: list[list[str]] = []
        self.device: str | None = None
        self.no_derivatives = ""
        self.derivative: CompiledDerivative | None = None
        self.copies = [not share_inputs] * len(call.arrays)

    def infer_outputs(self, change: Callable[[Any], Any] | None = None) -> Any:
        """The outputs that tracing the callable with fake tensors finds.

        Raises:
            InferenceError: it cannot be traced.
        """
        args, kwargs = self._call.cast_arguments()
        module = self._replicas.cpu_module()
        with _without_compilation(), restored(module):
            return infer_outputs(
                lambda: tracing_copy(module),
                args,
                kwargs,
                requires_grad=self._call.requires_grad,
                change=change,
            )

    def results(self, outputs: Any) -> list[Node]:
        """Empty: `EagerRunner` flattens what the callable returns."""
        del outputs
        return []

    def eager_runner(self, outputs: Any, n_lengths: int) -> EagerRunner:
        """The runner of the plan's calls."""
        call = self._call
        shared = [
            not copied and call.casts[i] in (None, str(call.specs[i].dtype))
            for i, copied in zip(call.arrays, self.copies, strict=True)
        ]
        return EagerRunner(self._replicas, call, outputs, n_lengths, shared, len(self.parameters))


def _without_compilation() -> AbstractContextManager[Any]:
    """Disables torch.compile: compiled modules run as eager ones."""
    if not is_compiler_loaded():  # nothing is compiled, and the import takes seconds
        return nullcontext()
    return torch.compiler.set_stance("force_eager")
