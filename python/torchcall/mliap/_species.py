"""The elements that a model declares."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from jax.core import Tracer

from torchcall._wrapper import TorchModuleWrapper

Species = tuple[int, ...]
"""Atomic numbers, ascending."""

# Where a module that only wraps another keeps it.
_INNER = ("_orig_mod", "module", "model")
_DEPTH = 4


def species_of(module: object) -> Species | None:
    """The atomic numbers that a module declares, None where it declares none.

    Read from its attribute or buffer `species`, else `atomic_numbers`: positive integers. A module
    without either is searched for in `_orig_mod`, `module` and `model`, where wrappers keep it.
    """
    for _ in range(_DEPTH):
        for name in ("species", "atomic_numbers"):
            found = _numbers(_attribute(module, name))
            if found is not None:
                return found
        inner = (getattr(module, name, None) for name in _INNER)
        module = next((part for part in inner if isinstance(part, torch.nn.Module)), None)
        if module is None:
            return None
    return None


def wrapped_species(wrapper: object) -> Species | None:
    """`species_of` the module behind a wrapper, or what its package states."""
    return _wrapped_species(wrapper) if isinstance(wrapper, TorchModuleWrapper) else None


def unknown_element(species: Species | None, numbers: Any, batch: Any, n_systems: int) -> str:
    """Describes the first atom of an undeclared element, as an error does; empty if there is none.

    Traced arrays have no values and pass: the call checks them.

    Args:
        species: what the model declares.
        numbers: (n,) atomic numbers.
        batch: (n,) system of each atom, or None; atoms outside [0, n_systems) are padding.
        n_systems: number of systems.
    """
    if species is None or isinstance(numbers, Tracer) or isinstance(batch, Tracer):
        return ""
    known = np.isin(np.asarray(numbers), species)
    if batch is not None:
        known |= (np.asarray(batch) < 0) | (np.asarray(batch) >= n_systems)
    if known.all():
        return ""
    entry = int(np.argmin(known))
    listed = ", ".join(map(str, species))
    return f"expected one of {listed}, got {int(np.asarray(numbers)[entry])} at entry {entry}"


_cache: weakref.WeakKeyDictionary[TorchModuleWrapper, Species | None] = weakref.WeakKeyDictionary()


def _wrapped_species(wrapper: TorchModuleWrapper) -> Species | None:
    if wrapper not in _cache:
        behind = wrapper._inspected()
        stated = isinstance(behind, dict)
        _cache[wrapper] = _numbers(behind.get("species")) if stated else species_of(behind)
    return _cache[wrapper]


def _attribute(module: object, name: str) -> Any:
    value = getattr(module, name, None)
    if value is None and isinstance(module, torch.jit.ScriptModule):
        # Scripting drops the attributes of a class; a live module still knows its class.
        kind = getattr(getattr(module, "_concrete_type", None), "py_class", None)
        value = getattr(kind, name, None)
    return value


def _numbers(value: Any) -> Species | None:
    if isinstance(value, torch.Tensor):
        value = value.reshape(-1).tolist()
    numbers = value if isinstance(value, list | tuple) else []
    if numbers and all(type(number) is int and number > 0 for number in numbers):
        return tuple(sorted(set(numbers)))
    return None
