"""Which rows of an output go into the cache: system by system, or as a `patch_idx_view` says."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from torchcall.mliap._state._patch import Accept, accepted
from torchcall.mliap._state._potential import EMPTY, EmptyType, PositionAndCell, PotentialOut
from torchcall.mliap._table import Table, rows_of


class Written(NamedTuple):
    """The system whose acceptance decides over each row; the number of systems where none does.

    Attributes:
        keys: the systems, as a table without data.
        rows: of each part of an output, its shape being the number of rows.
    """

    keys: Table[Any, None]
    rows: PotentialOut[Any, EmptyType]


def natural(
    out: PotentialOut[Any, EmptyType], system: Int[Array, " n"]
) -> PotentialOut[Any, EmptyType]:
    """Each row goes with its own system."""
    b = len(out.total_energies.keys)
    own = jnp.arange(b, dtype=jnp.int32)
    system = jnp.where((system >= 0) & (system < b), system, b).astype(jnp.int32)
    gradients: Any = system
    if isinstance(out.gradients, PositionAndCell):
        gradients = PositionAndCell(system, own)
    return PotentialOut(Table(out.total_energies.keys, own), gradients, EMPTY)


def limited(out: PotentialOut[Any, EmptyType], index: Any) -> PotentialOut[Any, EmptyType]:
    """Each row goes with the system that a `patch_idx_view` returned for it.

    Args:
        out: the output.
        index: what the view returned: an output with an index, or `EMPTY`, for each part.

    Raises:
        TypeError: a part is missing.
        ValueError: an index has not one entry for each row, or a key that is no system.
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
    """Whether each row goes in."""
    yes = jnp.append(accepted(accept, written.keys.keys), False)
    return jax.tree.map(lambda row: yes[row], written.rows)
