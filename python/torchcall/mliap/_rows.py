"""Keys and arrays of the tables in a state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float

from torchcall.mliap._table import Index, ParticleId, SystemId, rows_of


class Rows(NamedTuple):
    """Keys and data of a table, or of an object that is used like one."""

    keys: tuple[Any, ...]
    data: Any


def particle_rows(particles: Any) -> Rows:
    """Keys and data of the atoms. Without a table, the keys are 0, 1, ….

    Raises:
        TypeError: an attribute is missing.
    """
    return _rows(particles, "particles", "positions", ParticleId)


def system_rows(systems: Any) -> Rows:
    """Keys and data of the systems. Without a table, the keys are 0, 1, ….

    Raises:
        TypeError: there is no cell.
    """
    return _rows(systems, "systems", "cell", SystemId)


def _rows(table: Any, name: str, attribute: str, label: type[int]) -> Rows:
    data, keys = table, None
    if not hasattr(table, attribute) and hasattr(table, "data"):
        data, keys = table.data, getattr(table, "keys", None)
    value = required(data, attribute, name)
    n = jnp.shape(getattr(value, "vectors", value))[:1]
    if not n:
        raise ValueError(f"torchcall: {name}.{attribute}: expected an array, got a scalar")
    if keys is None:
        keys = tuple(map(label, range(n[0])))
    if len(keys) != n[0] or len(set(keys)) != n[0]:
        raise ValueError(
            f"torchcall: {name}.keys: expected a unique key for each of {n[0]} {name}, "
            f"got {len(keys)} keys, {len(set(keys))} of them unique"
        )
    return Rows(tuple(keys), data)


def required(owner: Any, attribute: str, name: str) -> Any:
    """The attribute; if it is missing, raises a TypeError that names it."""
    if not hasattr(owner, attribute):
        raise TypeError(
            f"torchcall: {name}: expected an attribute {attribute!r}, got {type(owner).__name__} "
            "without it"
        )
    return getattr(owner, attribute)


def raise_if_concrete(wrong: Bool[Array, ""], name: str, expected: str, got: Any) -> None:
    """Raises ValueError if `wrong` is concrete and true. Under `jit`, callers return a flag."""
    if not isinstance(wrong, Tracer) and bool(wrong):
        raise ValueError(f"torchcall: {name}: expected {expected}, got {got}")


def cells_of(systems: Rows) -> tuple[Float[Array, "b 3 3"], Bool[Array, "b 3"]]:
    """Lattice vectors, (b, 3, 3) in Å, and periodicity, (b, 3).

    Raises:
        ValueError: a shape is wrong.
    """
    cell = systems.data.cell
    b = len(systems.keys)
    vectors = jnp.asarray(getattr(cell, "vectors", cell))
    if vectors.shape != (b, 3, 3):
        raise ValueError(
            f"torchcall: systems.cell: expected shape {(b, 3, 3)}, got {vectors.shape}"
        )
    pbc = getattr(systems.data, "pbc", getattr(cell, "periodic", None))
    if pbc is None:
        return vectors, jnp.any(lax.stop_gradient(vectors) != 0, axis=-1)
    periodic = jnp.asarray(pbc, bool)
    if periodic.shape not in ((3,), (b, 3)):
        raise ValueError(
            f"torchcall: systems.pbc: expected shape (3,) or {(b, 3)}, got {periodic.shape}"
        )
    return vectors, jnp.broadcast_to(periodic, (b, 3))


def cutoffs_of(cutoffs: Any, systems: Rows, name: str) -> Float[Array, " b"]:
    """The cutoff of each system in Å, from a table with one entry per system or one for all.

    Raises:
        TypeError: `cutoffs` is not a table.
        ValueError: its shape is wrong, or a system has no entry.
    """
    if not (hasattr(cutoffs, "keys") and hasattr(cutoffs, "data")):
        raise TypeError(
            f"torchcall: {name}: expected a table by system, got {type(cutoffs).__name__}"
        )
    values, b = jnp.asarray(cutoffs.data), len(systems.keys)
    if values.shape != (len(cutoffs.keys),):
        raise ValueError(
            f"torchcall: {name}: expected shape {(len(cutoffs.keys),)}, got {values.shape}"
        )
    if len(cutoffs.keys) == 1:
        return jnp.broadcast_to(values, (b,))
    return values[rows_of(Index(systems.keys, jnp.arange(b)), tuple(cutoffs.keys), name)]
