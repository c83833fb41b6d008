"""The elements that a model declares."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jax.core import Tracer

from torchcall._undocumented.of_torch import COMPILED, python_class
from torchcall._wrapper import TorchModuleWrapper

Species = tuple[int, ...]
"""Atomic numbers, ascending."""

# Attributes under which wrapper modules store the wrapped module.
_INNER = (COMPILED, "module", "model")
_DEPTH = 4


def species_of(module: object) -> Species | None:
    """The atomic numbers that a module declares, None where it declares none.

    Read from its attribute or buffer `species`, else `atomic_numbers`: positive integers. If a
    module has neither, the modules in its attributes `module` and `model`, or that
    `torch.compile` wrapped, are read.
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
    """The elements that a wrapper's module or its package declares."""
    return wrapper._fact("species", _declared) if isinstance(wrapper, TorchModuleWrapper) else None


def unknown_element(species: Species | None, numbers: Any, batch: Any, n_systems: int) -> str:
    """Describes the first atom of an undeclared element, for an error text; empty if none.

    Traced arrays are not checked here: the call checks them.

    Args:
        species: the elements that the model declares.
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
    return (
        f"expected one of {listed(species)}, got {int(np.asarray(numbers)[entry])} at entry {entry}"
    )


def listed(species: Species) -> str:
    """As "1-94, 96": three or more in a row are a range."""
    runs: list[list[int]] = []
    for number in species:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{r[0]}-{r[-1]}" if len(r) > 2 else ", ".join(map(str, r)) for r in runs]
    return ", ".join(parts)


def _declared(found: object) -> Species | None:
    """The elements that a module, or the metadata of a package, declares."""
    return _numbers(found.get("species")) if isinstance(found, dict) else species_of(found)


def _attribute(module: object, name: str) -> Any:
    value = getattr(module, name, None)
    if value is None and isinstance(module, torch.jit.ScriptModule):
        # Scripting drops class attributes; a module scripted in this process retains its class.
        value = getattr(python_class(module), name, None)
    return value


def _numbers(value: Any) -> Species | None:
    if isinstance(value, torch.Tensor):
        value = value.reshape(-1).tolist()
    numbers = value if isinstance(value, list | tuple) else []
    if numbers and all(type(number) is int and number > 0 for number in numbers):
        return tuple(sorted(set(numbers)))
    return None
