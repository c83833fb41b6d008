"""Potentials and neighbour lists for jax-md: `simulate`, `minimize`, `quantity`.

jax-md's conventions hold. A box is a length, three lengths, or a matrix whose *columns* are lattice
vectors. Positions are real or fractional. `perturbation` P multiplies displacements, `r → P r`.
Forces are in real space for fractional positions, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax_md import partition, space
from jaxtyping import Array, Bool, Float

from torchcall import mliap
from torchcall.mliap import AtomGraph, TorchMliap
from torchcall.mliap._neighbors.neighbor_list import allocated

Box = Any


@partial(jax.tree_util.register_dataclass, data_fields=["edges"], meta_fields=["made_by"])
@dataclass(frozen=True)
class NeighborList:
    """A neighbour list for jax-md's positions and boxes; a pytree. Made by `neighbor_fn`.

    Attributes:
        edges: the list for real-space positions.
        made_by: its settings; static.
    """

    edges: mliap.NeighborList
    made_by: NeighborListFns

    @property
    def did_buffer_overflow(self) -> Bool[Array, ""]:
        """Whether a pair may be missing, () bool. Then allocate another list."""
        return self.edges.did_overflow

    def update(
        self, position: Float[Array, "N 3"], *, box: Box | None = None, **unused: Any
    ) -> NeighborList:
        """The list of other positions; works in `jit`.

        Args:
            position: (N, 3), real in Å, or fractional.
            box: the box; that of `neighbor_fn` if None.
            **unused: ignored, as in jax-md.
        """
        del unused
        positions, cell = self.made_by.real_space(position, box)
        return replace(self, edges=self.edges.update(positions, cell))


@dataclass(frozen=True, eq=False)  # compared by identity: a box may be an array
class NeighborListFns:
    """Allocates and updates lists, like `jax_md.partition.NeighborListFns`."""

    settings: mliap.NeighborListFn
    box: Box | None
    fractional_coordinates: bool

    def allocate(
        self,
        position: Float[Array, "N 3"],
        extra_capacity: int = 0,
        *,
        box: Box | None = None,
        **unused: Any,
    ) -> NeighborList:
        """A list with room for these positions; outside `jit`.

        Args:
            position: (N, 3), float32 or float64, real in Å, or fractional.
            extra_capacity: further neighbours of each atom to make room for.
            box: the box; that of `neighbor_fn` if None.
            **unused: ignored, as in jax-md.

        Raises:
            TypeError, ValueError: an argument has a wrong shape, dtype or value.
        """
        del unused
        positions, cell = self.real_space(position, box)
        n_atoms = positions.shape[0]
        pbc, batch = np.full((1, 3), self.box is not None), np.zeros(n_atoms, np.int32)
        edges = self.settings.allocate(positions, cell, pbc, batch)
        if extra_capacity:
            more = extra_capacity * n_atoms
            old = edges.layout
            layout = replace(old, edges=old.edges + more, candidates=old.candidates + more)
            edges = allocated(edges.positions, edges.cell, edges.pbc, edges.batch, layout)
        return NeighborList(edges, self)

    def update(
        self, position: Float[Array, "N 3"], neighbors: NeighborList, **kwargs: Any
    ) -> NeighborList:
        """`neighbors.update(position, **kwargs)`."""
        return neighbors.update(position, **kwargs)

    def real_space(self, position: Array, box: Box | None) -> tuple[Array, Array]:
        """Positions in Å and the cell."""
        position = _checked_positions("neighbor_fn", position)
        given = self.box if box is None else box
        box = None if given is None else _as_box(given, position.dtype)
        return _real_space(position, box, self.fractional_coordinates)


def neighbor_fn(
    model: TorchMliap | float,
    box: Box | None,
    *,
    fractional_coordinates: bool,
    dr_threshold: float = 0.5,
    capacity_multiplier: float = 1.25,
) -> NeighborListFns:
    """Neighbour lists of a model's cutoff, to use where jax-md's own would be.

    Unlike jax-md's, these lists may have a cutoff beyond half the box, and they notice changes of
    the box.

    Args:
        model: the potential, or the cutoff in Å.
        box: a length, (3,) or (3, 3) with lattice vectors in columns, in Å; None for open
            boundaries.
        fractional_coordinates: whether positions are fractional.
        dr_threshold: in Å. Pairs up to cutoff + dr_threshold are stored, and searched again when
            atoms or box have moved so far that a pair could be missing.
        capacity_multiplier: capacities are this factor times what the allocated positions need.

    Returns:
        An object with `allocate(position, box=…)` and `update(position, neighbors, box=…)`.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """
    _check_box("neighbor_fn", box, fractional_coordinates)
    cutoff = (
        float(np.max(np.asarray(model.cutoff.data))) if isinstance(model, TorchMliap) else model
    )
    settings = mliap.neighbor_list(
        cutoff, skin=dr_threshold, capacity_multiplier=capacity_multiplier
    )
    return NeighborListFns(settings, box, fractional_coordinates)


def energy_fn(
    model: TorchMliap,
    atomic_numbers: Any,
    box: Box | None,
    *,
    fractional_coordinates: bool,
    charge: float | None = None,
    spin: float | None = None,
) -> Callable[..., Float[Array, ""]]:
    """The potential energy as jax-md's integrators, minimisers and quantities call it.

    The function is `energy(position, neighbor, *, box=box, perturbation=None) → ()`, in eV. Its
    derivatives by position, box and perturbation are the model's own gradients: one evaluation
    gives the energy and all of them. Further keywords are ignored, as in jax-md.

    `neighbor` is a list of `neighbor_fn` or of jax-md. One of `neighbor_fn` is brought up to date
    at each call, so the pairs are always those within the cutoff. jax-md's has to be up to date
    within its `dr_threshold`. If a list overflowed, energy and derivatives are NaN.

    Args:
        model: the potential; derivatives by box and perturbation (NPT, pressure, stress) need
            one that computes cell gradients.
        atomic_numbers: (N,).
        box: a length, (3,) or (3, 3) with lattice vectors in columns, in Å; None for open
            boundaries. Calls may pass another one.
        fractional_coordinates: whether positions are fractional, as with
            `jax_md.space.periodic_general(box, fractional_coordinates=True)`.
        charge: total charge in e; 0 if None.
        spin: as the model counts it; 0 if None.

    Returns:
        The function.

    Raises:
        TypeError, ValueError: an argument is wrong; or, from the function, a list is missing or a
            shape is wrong.
    """
    _check_box("energy_fn", box, fractional_coordinates)
    if not isinstance(model, TorchMliap):
        raise TypeError(
            f"torchcall: energy_fn: model: expected a TorchMliap, got a {type(model).__name__}; "
            "torchcall.models.load makes one"
        )
    numbers = np.asarray(atomic_numbers)
    if numbers.ndim != 1 or not np.issubdtype(numbers.dtype, np.integer):
        raise TypeError(
            "torchcall: energy_fn: atomic_numbers: expected integers (N,), got "
            f"{numbers.dtype.name} {numbers.shape}"
        )
    numbers = numbers.astype(np.int32)
    largest = float(np.max(np.asarray(model.cutoff.data)))
    default_box = box

    def energy(
        position: Float[Array, "N 3"],
        neighbor: Any = None,
        *,
        box: Box | None = None,
        perturbation: Any = None,
        **unused: Any,
    ) -> Float[Array, ""]:
        del unused
        position = _checked_positions("energy_fn", position, len(numbers))
        given = default_box if box is None else box
        lattice = None if given is None else _as_box(given, position.dtype)
        positions, cell = _real_space(position, lattice, fractional_coordinates)
        if perturbation is not None:
            change = _as_box(perturbation, position.dtype, "perturbation")
            positions = space.raw_transform(change, positions)
            cell = space.raw_transform(change, cell)
        system = _system(charge, spin, position.dtype)
        pbc = jnp.full((1, 3), lattice is not None)
        graph = _graph(neighbor, positions, cell, pbc, jnp.asarray(numbers), largest, system)
        # Integrators at constant pressure ask twice for the same box derivative.
        used = model if perturbation is None else replace(model, _reuses_last=True)
        return mliap.energy(used, graph)[0]

    return energy


def _system(charge: float | None, spin: float | None, dtype: Any) -> dict[str, Any]:
    values = {"charge": charge, "spin": spin}
    return {k: jnp.asarray([v], dtype) for k, v in values.items() if v is not None}


def _graph(
    neighbor: Any,
    positions: Array,
    cell: Array,
    pbc: Array,
    numbers: Array,
    cutoff: float,
    system: dict[str, Any],
) -> AtomGraph:
    if isinstance(neighbor, NeighborList):
        edges = neighbor.edges.update(positions, cell)
        return AtomGraph.from_neighbors(
            edges, positions, cell, numbers, check_moved=False, **system
        )
    if not isinstance(neighbor, partition.NeighborList):
        got = "none" if neighbor is None else f"a {type(neighbor).__name__}"
        raise TypeError(
            "torchcall: energy_fn: neighbor: expected a list from "
            f"torchcall.integrations.jax_md.neighbor_fn or jax-md, got {got}"
        )
    fixed = jax.lax.stop_gradient((positions, cell))
    edges = mliap.edges_from_jax_md(neighbor, *fixed, pbc, cutoff=cutoff)
    return AtomGraph(
        positions,
        numbers,
        cell,
        pbc,
        None,
        edges.edge_index,
        edges.cell_offsets,
        edges.n_edges,
        did_overflow=edges.did_overflow | (jnp.asarray(neighbor.cell_size_too_small) != 0),
        **system,
    )


def _real_space(
    position: Array, box: Array | None, fractional: bool
) -> tuple[Float[Array, "N 3"], Float[Array, "1 3 3"]]:
    """Positions in Å and the cell, whose rows are lattice vectors.

    The derivative of jax-md's `transform` by fractional positions is the identity: forces are in
    real space, as `shift_fn` expects them.
    """
    if box is None:
        return position, jnp.zeros((1, 3, 3), position.dtype)
    cell = box.T if box.ndim == 2 else np.eye(3, dtype=box.dtype) * box
    return space.transform(box, position) if fractional else position, jnp.asarray(cell)[None]


def _as_box(box: Box, dtype: Any, name: str = "box") -> Array:
    """A box or perturbation as an array of the positions' dtype."""
    box = box.astype(dtype) if isinstance(box, Tracer) else np.asarray(box, dtype)
    if box.shape not in ((), (1,), (3,), (3, 3)):
        raise ValueError(
            f"torchcall: {name}: expected a scalar, (3,) or (3, 3), got shape {box.shape}"
        )
    return box.reshape(()) if box.shape == (1,) else box


def _check_box(where: str, box: Box | None, fractional_coordinates: bool) -> None:
    if box is None and fractional_coordinates:
        raise ValueError(
            f"torchcall: {where}: box: expected a box for fractional coordinates, got None"
        )
    if box is not None:
        _as_box(box, jnp.result_type(float))


def _checked_positions(where: str, position: Any, n_atoms: int | None = None) -> Array:
    position = jnp.asarray(position)
    expected = (position.shape[0] if position.ndim else 0) if n_atoms is None else n_atoms
    if position.shape != (expected, 3):
        count = "N" if n_atoms is None else n_atoms
        raise ValueError(
            f"torchcall: {where}: position: expected shape ({count}, 3), got {position.shape}"
        )
    if position.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"torchcall: {where}: position: expected float32 or float64, got {position.dtype}"
        )
    return position
