"""Modules whose parameters are arguments of the call."""

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import torch

from torchcall import _bridge
from torchcall._call.call import Call
from torchcall._call.specs import describe, is_static, torch_dtype_name, type_name
from torchcall._engines.containers import attributes_of, hidden_references, renewed
from torchcall._engines.eager import EagerCall, EagerSource
from torchcall._engines.names import name_of
from torchcall._engines.script import FileSource, LiveSource, ScriptCall
from torchcall._undocumented.of_torch import (
    BUFFERS,
    PARAMETERS,
    Movable,
    current_dispatch_mode,
    write_count,
)


class Parameter(NamedTuple):
    """A parameter: its names, of which the first is its key, and its dtype and shape as text."""

    names: list[str]
    form: str


def parameters_of(module: torch.nn.Module) -> list[tuple[Parameter, torch.Tensor]]:
    """The parameters of floating point and their values, sorted by their keys.

    Parameters that share all their memory are one parameter of several names. A copy of the module
    would not show it.
    """
    found: dict[Any, tuple[Parameter, torch.Tensor]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        if not (value.is_floating_point() or value.is_complex()):
            continue
        memory = (value.data_ptr(), value.dtype, value.shape, value.stride())
        key = memory if value.numel() > 0 and not value.is_meta else id(value)
        form = f"{torch_dtype_name(value.dtype)} {tuple(value.shape)}"
        found.setdefault(key, (Parameter([], form), value))[0].names.append(name)
    return sorted(found.values(), key=lambda entry: entry[0].names[0])


class FunctionalSource:
    """A source of calls whose first argument are the module's parameters.

    Attributes:
        parameters: those of the module.
    """

    parameters: list[Parameter]

    def checked_names(self, call: Call) -> list[list[str]]:
        """Per parameter of a call, in JAX's order: its names.

        Raises:
            ValueError, TypeError: a parameter is missing, unknown or has another shape or dtype.
        """
        tree = jax.tree.unflatten(call.treedef, range(len(call.specs)))[0][0]
        expected = {parameter.names[0]: parameter for parameter in self.parameters}
        if not isinstance(tree, dict) or not all(isinstance(x, int) for x in tree.values()):
            if isinstance(tree, int):  # the number of a leaf
                spec = call.specs[tree]
                got = repr(spec) if is_static(spec) else f"an array, {describe(spec)}"
            else:
                got = "nested containers" if isinstance(tree, dict) else f"a {type_name(tree)}"
            raise TypeError(
                "parameters: expected a dict of arrays by parameter name, as from "
                f"torchcall.functional, got {got}"
            )
        for key, parameter in expected.items():
            wanted = parameter.form
            if key not in tree:
                raise ValueError(f"parameters[{key!r}]: expected {wanted}, got no such entry")
            spec, cast = call.specs[tree[key]], call.casts[tree[key]]
            if is_static(spec):
                raise TypeError(f"parameters[{key!r}]: expected {wanted}, got {spec!r}")
            given = spec if cast is None else jax.ShapeDtypeStruct(spec.shape, cast)
            if describe(given) != wanted:
                raise ValueError(f"parameters[{key!r}]: expected {wanted}, got {describe(given)}")
        for key in tree:
            if key not in expected:
                raise ValueError(
                    f"parameters[{key!r}]: expected the module's parameters "
                    f"{list(expected)}, got this entry too"
                )
        return [expected[key].names for key in sorted(tree, key=lambda key: tree[key])]


class ScriptFunctional(FunctionalSource):
    """A TorchScript module. C++ stores the parameters in a copy of the module object.

    Args:
        source: of the module; its weights must not change.
        name: what errors call it.
        parameters: those of the module.
    """

    engine = "TorchScript"

    def __init__(
        self, source: LiveSource | FileSource, name: str, parameters: list[Parameter]
    ) -> None:
        self._source = source
        self.parameters = parameters
        self.name = self.label = name

    @property
    def weights(self) -> str:
        """Whose the constants are."""
        return self._source.weights

    @property
    def path(self) -> Path | None:
        """The archive, or None."""
        return self._source.path

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Makes the native model."""
        return self._source.load(freeze=freeze, requires_grad=requires_grad)

    def python_module(self, model: _bridge.Model) -> Any:
        """The module, with the parameters that it had."""
        return self._source.python_module(model)

    def prepare_call(self, model: _bridge.Model, call: Call) -> ScriptCall:
        """Checks and plans a call."""
        names = self.checked_names(call)
        return ScriptCall(self._source, model, _without_parameters(call, len(names)), names)


def _without_parameters(call: Call, n: int) -> Call:
    """The call as the module gets it."""
    (_, *args), kwargs = jax.tree.unflatten(call.treedef, [0] * len(call.specs))
    return dataclasses.replace(
        call,
        treedef=jax.tree.structure((tuple(args), kwargs)),
        specs=call.specs[n:],
        names=call.names[n:],
        casts=call.casts[n:],
    )


class EagerFunctional(FunctionalSource, EagerSource):
    """An eager module.

    Args:
        module: the module; it is copied.
        parameters: those of the module.
        share_inputs: whether its inputs refer to XLA's memory instead of copies.
    """

    def __init__(
        self, module: torch.nn.Module, parameters: list[Parameter], *, share_inputs: bool
    ) -> None:
        _refuse_hidden(module, {name for parameter in parameters for name in parameter.names})
        try:
            copied = _copied(module, {})
        except Exception as error:  # raised by an attribute that cannot be copied
            raise TypeError(
                f"torchcall: {name_of(module)}: functional: expected a module that copy.deepcopy "
                f"copies, got {type_name(error)}: {error}"
            ) from error
        self.parameters = parameters
        keys = [parameter.names for parameter in parameters]
        super().__init__(_WithParameters(copied, keys), share_inputs=share_inputs)
        self.name = self.label = name_of(module)

    def prepare_call(self, model: _bridge.Model, call: Call) -> EagerCall:
        """Checks and plans a call."""
        prepared = super().prepare_call(model, call)
        prepared.parameters = self.checked_names(call)
        return prepared


def _refuse_hidden(module: torch.nn.Module, keys: set[str]) -> None:
    for attribute, parameter in hidden_references(module, keys):
        raise ValueError(
            f"torchcall: {name_of(module)}: functional: {attribute}: expected a module that reads "
            f"its parameters from its own attributes, got an object or function that refers to "
            f"{parameter!r} itself, and would use its old value; read it from `self` in `forward`, "
            "or pass it as an argument"
        )


class _WithParameters(Movable):
    """`(parameters, *args, **kwargs) → module(*args, **kwargs)`, a pure function.

    Each call uses a copy of the module alone, so that several may run at once.

    Args:
        module: used as a template.
        keys: the names of each parameter.
    """

    def __init__(self, module: torch.nn.Module, keys: list[list[str]]) -> None:
        super().__init__()
        self.module = module
        self._keys = keys
        # One copy already now: inside a mode of fake tensors it would have fake buffers.
        self._free = [_Copy(module, keys)]

    def forward(self, parameters: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        try:
            own = self._free.pop()
        except IndexError:
            own = _Copy(self.module, self._keys)
        result = own(parameters, args, kwargs)
        self._free.append(own)  # not after an error
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "_WithParameters":
        return _WithParameters(_copied(self.module, memo), self._keys)

    def moved(self) -> None:
        """Drops the copies of tensors on another device."""
        self._free.clear()


class _Copy:
    """A copy of a module, with other parameters in each call and the same state before each."""

    def __init__(self, module: torch.nn.Module, keys: list[list[str]]) -> None:
        shared = {id(weight): weight for weight in module.parameters()}
        self._module = _copied(module, dict(shared))
        parts = dict(self._module.named_modules(remove_duplicate=False))
        slots = [(names[0], *_slot(parts, name)) for names in keys for name in names]
        self._slots = [(key, entries, name, entries[name]) for key, entries, name in slots]
        self._attributes = [(part, dict(vars(part))) for part in self._module.modules()]
        self._held = [
            (vars(part), name, value)
            for part in self._module.modules()
            for name, value in attributes_of(part).items()
            if not isinstance(value, bool | int | float | str | None)
        ]
        self._buffers = [
            (name, entries, key, value, write_count(value), _statistic(key, value))
            for name, entries, key, value in _buffers(parts)
        ]

    def __call__(
        self, parameters: dict[str, torch.Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given: dict[int, torch.Tensor] = {}
        for key, entries, name, constant in self._slots:
            entries[name] = given[id(constant)] = parameters[key]
        memo: dict[int, Any] = {}
        for attributes, name, value in self._held:
            attributes[name] = renewed(value, given, memo)
        try:
            result = self._module(*args, **kwargs)
        finally:  # a reference to the parameters would retain them
            for _, entries, name, constant in self._slots:
                entries[name] = constant
            for part, before in self._attributes:
                now = vars(part)
                if len(now) != len(before) or any(now.get(k) is not v for k, v in before.items()):
                    now.clear()
                    now.update(before)
        self._check_buffers()
        return result

    def _check_buffers(self) -> None:
        for name, entries, key, value, count, before in self._buffers:
            same = entries.get(key) is value and write_count(value) == count
            if same and (before is None or _is_traced() or torch.equal(before, value)):
                continue
            raise ValueError(
                f"buffer {name!r}: expected a module that does not change its buffers, got one "
                "that does; call .eval() on it before torchcall.functional, or return the new value"
            )


def _slot(parts: dict[str, torch.nn.Module], name: str) -> tuple[dict[str, Any], str]:
    owner, _, last = name.rpartition(".")
    return getattr(parts[owner], PARAMETERS), last


def _buffers(
    parts: dict[str, torch.nn.Module],
) -> Iterator[tuple[str, dict[str, Any], str, torch.Tensor]]:
    for path, part in parts.items():
        entries = getattr(part, BUFFERS)
        for key, value in entries.items():
            if value is not None:
                yield f"{path}.{key}".lstrip("."), entries, key, value


def _statistic(key: str, value: torch.Tensor) -> torch.Tensor | None:
    """A copy of a norm's statistics. torch does not count writes to them."""
    return value.clone() if key in ("running_mean", "running_var") else None


def _is_traced() -> bool:
    """Whether tensors have no values now."""
    return current_dispatch_mode() is not None


def _copied(module: torch.nn.Module, memo: dict[int, Any]) -> torch.nn.Module:
    """A deep copy. Tensors that were computed lose their graph."""
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)
