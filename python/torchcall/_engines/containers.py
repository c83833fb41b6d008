"""Lists, dicts and other containers that a module keeps, for calls with parameters of their own."""

import functools
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch

from torchcall._undocumented.of_torch import HOOKS

# What every module has. Of these, only `HOOKS` run in a call.
_OF_ALL_MODULES = frozenset(vars(torch.nn.Module()))


def attributes_of(part: torch.nn.Module) -> dict[str, Any]:
    """What a module's own code stored in it besides parameters, buffers and modules."""
    return {key: value for key, value in vars(part).items() if key not in _OF_ALL_MODULES}


def renewed(value: Any, tensors: Mapping[int, torch.Tensor], memo: dict[int, Any]) -> Any:
    """A copy of containers, with other tensors in place of some; anything else as it is.

    So writes to the copy do not change the original.

    Args:
        value: what an attribute holds.
        tensors: by the id of each tensor that is replaced.
        memo: the copies by the ids of the originals, shared by all attributes.
    """
    if isinstance(value, torch.Tensor):
        return tensors.get(id(value), value)
    kind = type(value)
    if kind not in _CONTAINERS and not _is_named_tuple(value):
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in (dict, OrderedDict, defaultdict):
        made = memo[id(value)] = value.copy()
        for key, entry in value.items():
            made[key] = renewed(entry, tensors, memo)
    elif kind in (list, deque):
        made = memo[id(value)] = value.copy()
        for k, entry in enumerate(value):
            made[k] = renewed(entry, tensors, memo)
    elif kind is functools.partial:
        args = [renewed(entry, tensors, memo) for entry in (value.func, *value.args)]
        made = functools.partial(*args, **renewed(value.keywords, tensors, memo))
    elif kind is set:
        made = value.copy()
    else:
        entries = [renewed(entry, tensors, memo) for entry in value]
        made = kind(entries) if kind is tuple else kind(*entries)
    memo[id(value)] = made
    return made


_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, functools.partial, set, tuple)


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(value, "_fields")


def hidden_references(module: torch.nn.Module, keys: Collection[str]) -> Iterator[tuple[str, str]]:
    """Attributes and hooks that use parameters where a call cannot replace them.

    These are functions that refer to a parameter, or to a part that has one, from outside of their
    code; and objects of other classes that hold a parameter.

    Args:
        module: the module.
        keys: names of the parameters.

    Yields:
        The attribute's name and a parameter's.
    """
    wanted: dict[int, str] = {}
    by_part: dict[int, str] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        if name in keys:
            wanted.setdefault(id(value), name)
    for path, part in module.named_modules():
        first = next((n for n, _ in part.named_parameters(path) if n in keys), None)
        if first is not None:
            by_part[id(part)] = first
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in _OF_ALL_MODULES and name not in HOOKS:
                continue
            found = _hidden(value, wanted, by_part)
            if found is not None:
                yield f"{path}.{name}".lstrip("."), found


def _hidden(value: Any, wanted: Mapping[int, str], by_part: Mapping[int, str]) -> str | None:
    seen: set[int] = set()
    # What is left to look at; whether a function refers to it, which copies share; and whether it
    # is in an object that calls do not renew.
    waiting = [(value, False, False)]
    while waiting:
        x, in_function, in_object = waiting.pop()
        if id(x) in seen or isinstance(x, type | types.ModuleType):
            continue
        seen.add(id(x))
        if isinstance(x, torch.Tensor):
            if id(x) in wanted and (in_function or in_object):
                return wanted[id(x)]
        elif isinstance(x, torch.nn.Module):
            if id(x) in by_part and in_function:
                return by_part[id(x)]
        elif isinstance(x, types.FunctionType):
            held = [cell.cell_contents for cell in x.__closure__ or () if _is_filled(cell)]
            held += [*(x.__defaults__ or ()), *(x.__kwdefaults__ or {}).values()]
            waiting += [(entry, True, in_object) for entry in held]
        elif isinstance(x, types.MethodType):
            waiting.append((x.__self__, in_function, True))
        elif isinstance(x, functools.partial):
            waiting += [(e, in_function, in_object) for e in (x.func, x.args, x.keywords)]
        elif isinstance(x, Mapping | list | tuple | set | frozenset | deque):
            kept = not (type(x) in _CONTAINERS or _is_named_tuple(x)) or type(x) is set
            entries = x.values() if isinstance(x, Mapping) else x
            waiting += [(entry, in_function, in_object or kept) for entry in entries]
        else:
            waiting += [(e, in_function, True) for e in getattr(x, "__dict__", {}).values()]
    return None


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
