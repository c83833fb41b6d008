"""Energies, gradients and virials of all replicas from one call of the model.

R replicas are one graph of R systems with one neighbour list. Integrators are written for one
replica and mapped with `vmap`; the functions here merge the mapped positions again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from torchcall.mliap import (
    AtomGraph,
    NeighborList,
    TorchMliap,
    energy_and_gradients,
    virial_from_lattice_gradient_jax,
)


class Evaluation(NamedTuple):
    """Energies in eV, ∂E/∂r in eV/Å, and virials dE/dε in eV (NaN without cell gradients)."""

    energy: Float[Array, " R"]
    gradients: Float[Array, "R N 3"]
    virial: Float[Array, "R 3 3"]


class Atoms(NamedTuple):
    """What is constant, of all replicas. Arguments, because XLA rebuilds constants in each step."""

    atomic_numbers: Int[Array, " RN"]
    charge: Float[Array, " R"]
    spin: Float[Array, " R"]


Evaluate = Callable[[Array, Array, Atoms, NeighborList], tuple[Evaluation, NeighborList]]


def evaluator(model: TorchMliap) -> Evaluate:
    """`evaluate(positions (R, N, 3), cell (R, 3, 3), atoms, neighbors)`, and the updated list."""

    def evaluate(
        positions: Array, cell: Array, atoms: Atoms, neighbors: NeighborList
    ) -> tuple[Evaluation, NeighborList]:
        flat = positions.reshape(-1, 3)
        neighbors = neighbors.update(flat, cell)
        graph = AtomGraph.from_neighbors(neighbors, flat, cell, **atoms._asdict())
        out = energy_and_gradients(model, graph)
        if out.cell_gradients is None:
            virial = jnp.full_like(cell, jnp.nan)
        else:
            virial = virial_from_lattice_gradient_jax(
                -out.position_gradients,
                flat,
                neighbors.batch,
                cell,
                out.cell_gradients,
                pbc=neighbors.pbc,
            )
        gradients = out.position_gradients.reshape(positions.shape)
        return Evaluation(out.energy, gradients, virial), neighbors

    return evaluate


class One(NamedTuple):
    """An evaluation of one replica: () energy, (N, 3) gradients, (3, 3) virial."""

    energy: Float[Array, ""]
    gradients: Float[Array, "N 3"]
    virial: Float[Array, "3 3"]


class Traced(threading.local):
    """The results of calls while a thread traces them; devices are traced by threads of their own.

    Attributes:
        calls: The results.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[Evaluation, NeighborList]] = []


def mapped(
    evaluate: Evaluate, traced: Traced
) -> Callable[[Array, Array, Atoms, NeighborList], One]:
    """`evaluate` of one replica, to be mapped over all of them: then it is one call.

    Positions (N, 3) and cell (3, 3) are mapped; atoms and list are those of all replicas.

    Args:
        evaluate: From `evaluator`.
        traced: The results of calls are appended while they are traced. jax-md's states have no
            place for energies and lists, and another call would cost another evaluation.
    """

    @custom_vmap
    def one(positions: Array, cell: Array, atoms: Atoms, neighbors: NeighborList) -> One:
        # Only shapes and dtypes of this are used.
        del atoms, neighbors
        nan = jnp.full((), jnp.nan, positions.dtype)
        return One(nan, nan * positions, nan * cell)

    @one.def_vmap
    def all_at_once(
        axis_size: int,
        in_batched: list[Any],
        positions: Array,
        cell: Array,
        atoms: Atoms,
        neighbors: NeighborList,
    ) -> tuple[One, One]:
        assert in_batched[0], "positions are mapped"
        if not in_batched[1]:
            cell = jnp.broadcast_to(cell, (axis_size, 3, 3))
        traced.calls.append(evaluate(positions, cell, atoms, neighbors))
        everything: Any = One(True, True, True)  # pyright: ignore[reportArgumentType]
        return One(*traced.calls[-1][0]), everything

    return one


def force_fn(one: Callable[..., One]) -> Callable[..., Array]:
    """Forces at fixed cells, as `jax_md.simulate` calls them."""

    def force(position: Array, *, cell: Array, atoms: Atoms, neighbors: Any, **_: Any) -> Array:
        return -one(position, cell, atoms, neighbors).gradients

    return force


def energy_fn(one: Callable[..., One]) -> Callable[..., Array]:
    """The energy at fractional positions, as `jax_md.simulate.npt_nose_hoover` calls it.

    `box` has lattice vectors in columns, `perturbation` p is a scalar: `r → p r`. The derivative by
    fractional positions is that by real ones, as jax-md's integrators expect. A derivative by the
    perturbation alone is asked for at the state's own positions, whose evaluation is `last`: so a
    step evaluates the model once.
    """

    def energy(
        position: Array,
        *,
        box: Array,
        last: One,
        atoms: Atoms,
        neighbors: Any,
        perturbation: Any = 1.0,
        **_: Any,
    ) -> Array:
        scale = jnp.asarray(perturbation, position.dtype)
        return _energy(position, scale, box, last, atoms, neighbors)

    def real_space(position: Array, scale: Array, box: Array) -> tuple[Array, Array]:
        cell = scale * box.T
        return jnp.dot(position, cell, precision="highest"), cell

    @jax.custom_jvp
    def _energy(
        position: Array, scale: Array, box: Array, last: One, atoms: Atoms, neighbors: Any
    ) -> Array:
        del last
        return one(*real_space(position, scale, box), atoms, neighbors).energy

    def _jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
        position, scale, box, last, atoms, neighbors = primals
        moves, strain, *_ = tangents
        if isinstance(moves, SymbolicZero):
            out, change = last, jnp.zeros((), position.dtype)
        else:
            out = one(*real_space(position, scale, box), atoms, neighbors)
            change = jnp.sum(out.gradients * moves)
        if not isinstance(strain, SymbolicZero):
            change = change + jnp.trace(out.virial) / scale * strain
        return out.energy, change

    _energy.defjvp(_jvp, symbolic_zeros=True)
    return energy
