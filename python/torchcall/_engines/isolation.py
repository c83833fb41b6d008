"""Protects the caller's module while it is traced with fake tensors."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# How many levels of functions in closures and attributes are searched.
_DEPTH = 3


def tracing_copy(module: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a module for tracing, which may set its attributes, buffers and gradients.

    Its parameters are new objects that share the original's memory. Its buffers are real copies,
    because tracing may update them (counters, for example). Anything that is not a module, or
    cannot be copied, is returned itself.
    """
    if not isinstance(module, torch.nn.Module):
        return module
    parameters = {
        id(weight): torch.nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
        for weight in module.parameters()
    }
    try:
        return copy.deepcopy(module, dict(parameters))
    except Exception:  # raised by an attribute that cannot be copied
        return module


@contextmanager
def restored(function: Callable[..., Any]) -> Iterator[None]:
    """Restores attributes and gradients of the modules and tensors that a function refers to."""
    modules, tensors = {}, {}
    for value in referenced_values(function):
        if isinstance(value, torch.nn.Module):
            modules |= {id(part): part for part in value.modules()}
            tensors |= {id(weight): weight for weight in value.parameters()}
        elif isinstance(value, torch.Tensor) and value.is_leaf:
            tensors[id(value)] = value
    attributes = [(part, _attributes(part)) for part in modules.values()]
    gradients = [(tensor, tensor.grad) for tensor in tensors.values()]
    try:
        yield
    finally:
        for part, before in attributes:
            vars(part).clear()
            vars(part).update(before)
        for tensor, gradient in gradients:
            tensor.grad = gradient


def _attributes(module: torch.nn.Module) -> dict[str, Any]:
    """`vars` of a module, with copies of its dicts of buffers, parameters and submodules."""
    return {k: type(v)(v) if type(v) is dict else v for k, v in vars(module).items()}


def referenced_values(value: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """What a callable refers to: bound object, attributes, closure, and the globals it names."""
    yield value
    if depth == 0:
        return
    reached: list[Any] = []
    if isinstance(value, functools.partial):
        reached += [value.func, *value.args, *value.keywords.values()]
    reached.append(getattr(value, "__self__", None))
    reached.append(getattr(value, "__wrapped__", None))
    code = getattr(value, "__code__", None)
    if code is not None:
        for cell in getattr(value, "__closure__", None) or ():
            try:
                reached.append(cell.cell_contents)
            except ValueError:  # not yet bound
                continue
        names = getattr(value, "__globals__", {})
        reached += [names[name] for name in code.co_names if name in names]
    elif not isinstance(value, torch.nn.Module | torch.Tensor | type):
        reached += list(getattr(value, "__dict__", {}).values())
    for found in reached:
        if callable(found):
            yield from referenced_values(found, depth - 1)
        else:
            yield found
