"""Checks of a neighbour list's arguments, and descriptions of its problems."""

from __future__ import annotations

import enum
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from torchcall.mliap._neighbors.frame import Frame


class Problem(enum.IntFlag):
    """Reasons why a list may miss a pair; any of them makes ``did_overflow`` true."""

    EDGES = 1
    CANDIDATES = 2
    BINS = 4
    CELL = 8
    NOT_FINITE = 16
    SKIN = 32


_DESCRIPTIONS = {
    Problem.EDGES: "more edges than capacity",
    Problem.CANDIDATES: "more pairs within cutoff + skin than capacity",
    Problem.BINS: "more atoms in neighbouring bins than capacity",
    Problem.CELL: "the cell has shrunk: the allocated number of images no longer covers the cutoff",
    Problem.NOT_FINITE: "positions or cell are not finite, the cell is flat, or atoms are far away",
    Problem.SKIN: "atoms or cell moved by more than the skin allows between two searches",
}


def describe(problems: int) -> str:
    """Describes the problems in English; "" if there are none."""
    return "; ".join(text for problem, text in _DESCRIPTIONS.items() if problems & problem)


def settings(cutoff: float, skin: float, capacity_multiplier: float) -> None:
    """Raises unless ``0 < cutoff``, ``0 ≤ skin``, ``1 ≤ capacity_multiplier < ∞``, all numbers."""
    numbers = {"cutoff": cutoff, "skin": skin, "capacity_multiplier": capacity_multiplier}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(
                f"torchcall: neighbor_list: {name}: expected a number, got {type(value).__name__}"
            )
    for name, value, good, wanted in (
        ("cutoff", cutoff, cutoff > 0, "a positive finite length in Å"),
        ("skin", skin, skin >= 0, "a finite length in Å that is not negative"),
        (
            "capacity_multiplier",
            capacity_multiplier,
            capacity_multiplier >= 1,
            "a finite factor of at least 1",
        ),
    ):
        if not (good and abs(value) <= sys.float_info.max):
            raise ValueError(f"torchcall: neighbor_list: {name}: expected {wanted}, got {value}")


def one_list(where: str, problems: jax.Array) -> None:
    """Raises if these problems are those of several lists, which `jax.vmap` made."""
    if problems.ndim:
        raise ValueError(
            f"torchcall: {where}: expected one list, got {problems.shape} lists, mapped by "
            "jax.vmap; update them under vmap, or take one of them: "
            "jax.tree.map(lambda x: x[0], nbrs)"
        )


def known_problems(where: str, problems: jax.Array) -> Problem:
    """The problems of one list outside programs, or an error."""
    if isinstance(problems, Tracer):
        raise TypeError(
            f"torchcall: {where}: expected a concrete list, got a traced one: call it outside jit"
        )
    one_list(where, problems)
    return Problem(int(np.asarray(problems)))


def device_of(where: str, array: jax.Array) -> Any:
    """The device of a list outside programs, or an error if there are several."""
    devices = array.devices()
    if len(devices) != 1:
        raise ValueError(
            f"torchcall: {where}: expected a list on one device, got one on {len(devices)}; use "
            "update inside jit, or jax.device_put(nbrs, device) before"
        )
    return next(iter(devices))


def same_as_allocated(name: str, got: Any, allocated: jax.Array) -> None:
    """Raises unless shape and dtype are the allocated ones."""
    if not isinstance(got, jax.Array | np.ndarray):
        raise TypeError(
            f"torchcall: NeighborList.update: {name}: expected an array, got {type(got).__name__}"
        )
    shape, dtype = np.shape(got), jnp.result_type(got)
    expected = (
        f"expected {allocated.dtype.name} {allocated.shape} as allocated, got {dtype.name} {shape}"
    )
    if shape != allocated.shape:
        raise ValueError(f"torchcall: NeighborList.update: {name}: {expected}")
    if dtype != allocated.dtype:
        raise TypeError(f"torchcall: NeighborList.update: {name}: {expected}")


def geometry(
    positions: Any, cell: Any, pbc: Any, batch: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The four arrays of one allocation as JAX arrays, or an error that names the wrong one."""
    where = "torchcall: NeighborListFn.allocate"
    for name, value in (("positions", positions), ("cell", cell), ("pbc", pbc), ("batch", batch)):
        if isinstance(value, Tracer):
            raise TypeError(
                f"{where}: {name}: expected a concrete array, got a traced one: allocate chooses "
                "array sizes from values, so call it outside jit and use update inside"
            )
    devices = positions.devices() if isinstance(positions, jax.Array) else ()
    device = next(iter(devices)) if len(devices) == 1 else None
    positions, cell, pbc, batch = (np.asarray(value) for value in (positions, cell, pbc, batch))
    n, b = (a.shape[0] if a.ndim else 0 for a in (positions, cell))
    for name, value, shape, text in (
        ("positions", positions, (n, 3), "(N, 3)"),
        ("cell", cell, (b, 3, 3), "(B, 3, 3)"),
        ("pbc", pbc, (b, 3), f"({b}, 3)"),
        ("batch", batch, (n,), f"({n},)"),
    ):
        if value.shape != shape:
            raise ValueError(f"{where}: {name}: expected shape {text}, got {value.shape}")
    if positions.dtype.name not in ("float32", "float64"):
        raise TypeError(
            f"{where}: positions: expected float32 or float64, got {positions.dtype.name}"
        )
    if cell.dtype != positions.dtype:
        raise TypeError(
            f"{where}: cell: expected the positions' {positions.dtype.name}, got {cell.dtype.name}"
        )
    if pbc.dtype != np.bool_:
        raise TypeError(f"{where}: pbc: expected bool, got {pbc.dtype.name}")
    if not np.issubdtype(batch.dtype, np.integer):
        raise TypeError(f"{where}: batch: expected integers, got {batch.dtype.name}")
    if n and (batch.min() < 0 or batch.max() >= b):
        raise ValueError(
            f"{where}: batch: expected systems in [0, {b}), got {batch.min()} to {batch.max()}"
        )
    if np.any(batch[1:] < batch[:-1]):
        first = int(np.argmax(batch[1:] < batch[:-1]))
        raise ValueError(
            f"{where}: batch: expected nondecreasing systems, got {batch[first + 1]} after "
            f"{batch[first]} at atom {first + 1}"
        )
    for name, value in (("positions", positions), ("cell", cell)):
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: {name}: expected finite values, got {_first_bad(value)}")
    if positions.dtype == np.float64 and not jax.config.read("jax_enable_x64"):
        raise TypeError(
            f"{where}: positions: expected float32 while jax_enable_x64 is off, got float64"
        )
    return jax.device_put((positions, cell, pbc, batch.astype(np.int32)), device)


def _first_bad(value: np.ndarray) -> str:
    index = tuple(int(k) for k in np.argwhere(~np.isfinite(value))[0])
    return f"{value[index]} at {index}"


def frame(frame: Frame, pbc: jax.Array) -> None:
    """Raises ValueError if a completed cell is flat or atoms are too far from the origin."""
    heights, periodic = np.asarray(frame.heights), np.asarray(pbc)
    flat = ~np.isfinite(heights).all(axis=1)
    if flat.any():
        system = int(np.argmax(flat))
        raise ValueError(
            f"torchcall: NeighborListFn.allocate: cell[{system}]: expected linearly independent "
            "lattice vectors along the periodic axes, got linearly dependent or zero ones with pbc "
            f"{tuple(periodic[system].tolist())}"
        )
    if not bool(frame.finite):
        raise ValueError(
            "torchcall: NeighborListFn.allocate: positions: expected finite values within 2**22 "
            "cells of the origin, got larger ones"
        )
