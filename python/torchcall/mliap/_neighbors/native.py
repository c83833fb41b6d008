"""The list as one custom call on the CPU, and outside programs as a function; without torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from torchcall import _bridge
from torchcall._targets import NEIGHBORS, register_neighbors
from torchcall.mliap._neighbors.check import Problem
from torchcall.mliap._neighbors.layout import Candidates, Layout, squared_threshold

_SCHEDULES = {"when-needed": 0, "always": 1, "never": 2}
_enabled = True


@contextmanager
def use_jax() -> Iterator[None]:
    """Lists allocated in this context are made in JAX, as on other platforms; for tests."""
    global _enabled
    _enabled = False
    try:
        yield
    finally:
        _enabled = True


def serves(positions: Array) -> bool:
    """Whether a list of these positions is native: whether they are on a CPU."""
    return _enabled and all(device.platform == "cpu" for device in positions.devices())


class Operands(NamedTuple):
    """What one update reads. The arrays from `problems` on are written in place.

    Attributes:
        positions: (N, 3), in Å.
        cell: (B, 3, 3), in Å.
        pbc: (B, 3) bool.
        batch: (N,) int32.
        basis: (B, 3, 3) int32; the search's lattice vectors are ``basis @ cell``.
        problems: () int32.
        last_positions: (N, 3), those of the last update, or of the first that found a problem.
        last_cell: (B, 3, 3), of the same update.
        candidates: Verlet list, None without a skin.
    """

    positions: Any
    cell: Any
    pbc: Any
    batch: Any
    basis: Any
    problems: Any
    last_positions: Any
    last_cell: Any
    candidates: Candidates | None


class Updated(NamedTuple):
    """What one update writes, as `NeighborList` has it."""

    edge_index: Any
    cell_offsets: Any
    n_edges: Any
    problems: Any
    last_positions: Any
    last_cell: Any
    candidates: Candidates | None


def update(operands: Operands, layout: Layout, schedule: str) -> Updated:
    """Brings a list up to date, inside a program."""
    register_neighbors()
    flat = _flat(operands)
    dtype = operands.positions.dtype
    results = (
        jax.ShapeDtypeStruct((2, layout.edges), jnp.int32),
        jax.ShapeDtypeStruct((layout.edges, 3), dtype),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    kept = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat[5:])
    call = jax.ffi.ffi_call(
        NEIGHBORS,
        results + kept,
        # Every mapped list has its own arrays and searches when it must.
        vmap_method="broadcast_all",
        input_output_aliases={k: k - 5 + len(results) for k in range(5, len(flat))},
    )
    attributes = {name: np.float64(value) for name, value in _attributes(layout, dtype).items()}
    return _updated(list(call(*flat, **attributes, schedule=np.int32(_SCHEDULES[schedule]))))


def update_outside(operands: Operands, layout: Layout, schedule: str) -> Updated:
    """`update` of NumPy arrays, which compiles nothing; returns NumPy arrays."""
    flat = [np.ascontiguousarray(x).reshape(np.shape(x)) for x in _flat(operands)]
    dtype = flat[0].dtype
    results = [
        np.empty((2, layout.edges), np.int32),
        np.empty((layout.edges, 3), dtype),
        np.empty((), np.int32),
        *(x.copy() for x in flat[5:]),
    ]
    _bridge.update_neighbors(
        flat, results, **_attributes(layout, dtype), schedule=_SCHEDULES[schedule]
    )
    return _updated(results)


def count(
    geometry: tuple[np.ndarray, ...], basis: np.ndarray, layout: Layout
) -> tuple[Problem, int, int]:
    """Problems, and the numbers of pairs within cutoff + skin and within the cutoff.

    Args:
        geometry: positions, cell, pbc and batch.
        basis: (B, 3, 3) int32.
        layout: cutoff and skin.
    """
    flat = [np.ascontiguousarray(x) for x in (*geometry, basis)]
    problems, candidates, edges = _bridge.count_neighbors(
        flat, **_attributes(layout, flat[0].dtype)
    )
    return Problem(problems), candidates, edges


def _flat(operands: Operands) -> list[Any]:
    return [*operands[:-1], *(operands.candidates or ())]


def _updated(results: list[Any]) -> Updated:
    index, offsets, count, problems, positions, cell, *rest = results
    candidates = Candidates(*rest) if rest else None
    return Updated(index, offsets, count, problems, positions, cell, candidates)


def _attributes(layout: Layout, dtype: Any) -> dict[str, float]:
    limit = float(squared_threshold(layout.cutoff, np.dtype(dtype)))
    return {"cutoff": layout.cutoff, "skin": layout.skin, "limit": limit}
