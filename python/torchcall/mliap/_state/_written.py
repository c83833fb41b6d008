"""Selects the rows of an output that are written to the cache."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from torchcall.mliap._state._patch import Accept, accepted
from torchcall.mliap._state._potential import EMPTY, EmptyType, PositionAndCell, PotentialOut
from torchcall.mliap._table import Table, rows_of


class Written(NamedTuple):
    """For each row, the system whose acceptance writes it; the number of systems means never.

    Attributes:
        keys: the systems, as a table without data.
        rows: for each part of an output, an index per row.
    """

    keys: Table[Any, None]
    rows: PotentialOut[Any, EmptyType]


def rows_by_system(
    out: PotentialOut[Any, EmptyType], system: Int[Array, " n"]
) -> PotentialOut[Any, EmptyType]:
    """Assigns each row to its own system."""
    b = len(out.total_energies.keys)
    own = jnp.arange(b, dtype=jnp.int32)
    system = jnp.where((system >= 0) & (system < b), system, b).astype(jnp.int32)
    gradients: Any = system
    if isinstance(out.gradients, PositionAndCell):
        gradients = PositionAndCell(system, own)
    return PotentialOut(Table(out.total_energies.keys, own), gradients, EMPTY)


def rows_by_view(out: PotentialOut[Any, EmptyType], index: Any) -> PotentialOut[Any, EmptyType]:
    """Assigns each row to the system that a `patch_idx_view` returned for it.

    Args:
        out: the output.
        index: the view's result: an output with an index, or `EMPTY`, for each part.

    Raises:
        TypeError: a part is missing.
        ValueError: an index has the wrong length, or a key that is no system.
    """
    keys = out.total_energies.keys
    for name in ("total_energies", "gradients"):
        if not hasattr(index, name):
            raise TypeError(
                "torchcall: patch_idx_view: expected an output with indices for its parts, got "
                f"{type(index).__name__} without {name}"
            )

    def rows(part: Any, values: Array, name: str) -> Array:
        if part is None or isinstance(part, EmptyType) or not jax.tree.leaves(part):
            return jnp.full(values.shape[:1], len(keys), jnp.int32)
        if isinstance(part, Table):
            part = part.data
        found = rows_of(part, keys, f"patch_idx_view: {name}").astype(jnp.int32)
        if found.shape != values.shape[:1]:
            raise ValueError(
                f"torchcall: patch_idx_view: {name}: expected a system for each of "
                f"{values.shape[0]} rows, got shape {found.shape}"
            )
        return found

    energies = rows(index.total_energies, out.total_energies.data, "total_energies")
    part, values = index.gradients, out.gradients
    if isinstance(values, PositionAndCell):
        gradients: Any = PositionAndCell(
            rows(getattr(part, "positions", None), values.positions, "gradients.positions"),
            rows(getattr(part, "cell", None), values.cell, "gradients.cell"),
        )
    else:
        gradients = rows(part, values, "gradients")
    return PotentialOut(Table(keys, energies), gradients, EMPTY)


def written_rows(written: Written, accept: Accept) -> PotentialOut[Any, EmptyType]:
    """Whether each row is written."""
    yes = jnp.append(accepted(accept, written.keys.keys), False)
    return jax.tree.map(lambda row: yes[row], written.rows)
