"""A group of replicas on one device, advanced by whole records.

A record is the `every` steps between two rows of the log. Each starts with a search for neighbours
at its positions. So what follows depends on the state alone, and a run continued from a record
equals an unbroken one bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from torchcall.md.ensembles import Settings, kinetic_energy, make_ensemble
from torchcall.md.evaluation import Atoms, Evaluation, One, Traced, evaluator, mapped
from torchcall.md.system import System
from torchcall.mliap import AtomGraph, NeighborList, TorchMliap, neighbor_list, run_chunks


class State(NamedTuple):
    """All that the next step depends on, besides the neighbour list.

    Attributes:
        md: jax-md's state, with a leading axis of replicas.
        last: The evaluation at its positions.
        cell: (R, 3, 3), the initial cell.
        atoms: Constants.
    """

    md: Any
    last: Evaluation
    cell: Float[Array, "R 3 3"]
    atoms: Atoms


class Frame(NamedTuple):
    """What is recorded of R replicas, as NumPy arrays in ASE's units.

    `pressure` is (2 K − tr W) / (3 V) with the virial W = dE/dε, in eV/Å³; NaN unless all axes are
    periodic. `conserved` is NaN where nothing is conserved.
    """

    positions: Float[Any, "R N 3"]
    momenta: Float[Any, "R N 3"]
    forces: Float[Any, "R N 3"]
    cell: Float[Any, "R 3 3"]
    potential: Float[Any, " R"]
    kinetic: Float[Any, " R"]
    conserved: Float[Any, " R"]
    temperature: Float[Any, " R"]
    pressure: Float[Any, " R"]
    volume: Float[Any, " R"]


@dataclass(frozen=True)
class Group:
    """Replicas that are evaluated in one call, and their neighbour list."""

    state: State
    neighbors: NeighborList


class Simulation:
    """The compiled functions of a run.

    Args:
        model: The potential.
        system: One replica.
        settings: The ensemble.
        every: Steps in a record.
        skin: Of the neighbour list, in Å.
        dtype: Of all floats.
        kb: Boltzmann's constant in eV/K.
    """

    def __init__(
        self,
        model: TorchMliap,
        system: System,
        settings: Settings,
        *,
        every: int,
        skin: float,
        dtype: Any,
        kb: float,
    ) -> None:
        self.model, self.system, self.dtype, self.every = model, system, dtype, every
        cutoff = float(np.max(np.asarray(model.cutoff.data)))
        self.search = neighbor_list(cutoff, skin=skin, capacity_multiplier=1.2)
        self._evaluate = evaluator(model)
        self._traced = Traced()
        one = mapped(self._evaluate, self._traced)
        self._ensemble = make_ensemble(settings, one, len(system.numbers))
        self._kb = kb
        self._record = self._steps(every)
        self._single = self._steps(1)
        self._initialise = jax.jit(self._init)
        self._observe = jax.jit(self._observed)

    def geometry(self, replicas: int) -> tuple[np.ndarray, ...]:
        """Positions, cell, pbc and batch of the initial structures."""
        system, count = self.system, len(self.system.numbers)
        return (
            np.tile(system.positions, (replicas, 1)).astype(self.dtype),
            np.broadcast_to(system.cell, (replicas, 3, 3)).astype(self.dtype),
            np.broadcast_to(system.pbc, (replicas, 3)).copy(),
            np.repeat(np.arange(replicas, dtype=np.int32), count),
        )

    def start(self, momenta: np.ndarray, keys: Array) -> Group:
        """The initial state.

        Args:
            momenta: (R, N, 3).
            keys: (R, 2) uint32, one for each replica.
        """
        replicas = len(momenta)
        positions, cell, pbc, batch = map(jnp.asarray, self.geometry(replicas))
        neighbors = self.search.allocate(positions, cell, pbc, batch)
        atoms = self._constants(replicas)
        mass = jnp.asarray(self.system.masses, self.dtype)
        shape = (replicas, -1, 3)
        state = self._initialise(
            keys,
            positions.reshape(shape),
            jnp.asarray(momenta, self.dtype),
            mass,
            cell,
            atoms,
            neighbors,
        )
        return Group(state, neighbors)

    def advance(self, group: Group) -> Group:
        """The group after one record.

        Raises:
            RunError: Positions are not finite.
        """
        return Group(*run_chunks(self._record, group.state, group.neighbors, 1, chunk=1))

    def single(self, group: Group) -> Group:
        """The group after one step."""
        return Group(*run_chunks(self._single, group.state, group.neighbors, 1, chunk=1))

    def frame(self, group: Group) -> Frame:
        """What is recorded of the group's present state."""
        return jax.device_get(self._observe(group.state))

    def warm_up(self, neighbors: NeighborList, calls: int = 3) -> None:
        """Calls the model on a list's data, as steps do.

        TorchScript optimises a model in its first calls, and rounds differently before.
        """
        replicas = len(neighbors.cell)
        graph = AtomGraph.from_neighbors(
            neighbors,
            neighbors.positions,
            neighbors.cell,
            **self._constants(replicas)._asdict(),
        )
        for _ in range(calls):
            self.model.warmup(graph)

    def energies(self, group: Group) -> np.ndarray:
        """(R,), in eV, evaluated at the group's positions."""
        return np.asarray(jax.jit(self._energies)(group.state, group.neighbors))

    def _constants(self, replicas: int) -> Atoms:
        system = self.system
        return Atoms(
            jnp.asarray(np.tile(system.numbers, replicas)),
            jnp.full(replicas, system.charge, self.dtype),
            jnp.full(replicas, system.spin, self.dtype),
        )

    def _energies(self, state: State, neighbors: NeighborList) -> Array:
        positions = jax.vmap(self._ensemble.positions)(state.md)
        return self._evaluate(positions, self._cell(state), state.atoms, neighbors)[0].energy

    def _init(
        self,
        keys: Array,
        positions: Array,
        momenta: Array,
        mass: Array,
        cell: Array,
        atoms: Atoms,
        neighbors: NeighborList,
    ) -> State:
        def init(key: Array, positions: Array, momenta: Array, cell: Array) -> Any:
            return self._ensemble.init(
                key,
                positions,
                momenta=momenta,
                mass=mass,
                cell=cell,
                atoms=atoms,
                neighbors=neighbors,
            )

        md = jax.vmap(init)(keys, positions, momenta, cell)
        positions = jax.vmap(self._ensemble.positions)(md)
        return State(md, self._evaluate(positions, cell, atoms, neighbors)[0], cell, atoms)

    def _steps(self, count: int) -> Callable[..., tuple[State, NeighborList]]:
        ensemble = self._ensemble

        def one(_: Any, carry: tuple[State, NeighborList]) -> tuple[State, NeighborList]:
            state, neighbors = carry

            def step(md: Any, last: Any, cell: Array) -> Any:
                return ensemble.step(
                    md, last=last, cell=cell, atoms=state.atoms, neighbors=neighbors
                )

            self._traced.calls.clear()
            md = jax.vmap(step)(state.md, One(*state.last), state.cell)
            ((last, neighbors),) = self._traced.calls
            self._traced.calls.clear()
            return state._replace(md=md, last=last), neighbors

        def steps(state: State, neighbors: NeighborList) -> tuple[State, NeighborList]:
            positions = jax.vmap(ensemble.positions)(state.md)
            neighbors = neighbors.rebuild(positions.reshape(-1, 3), self._cell(state))
            return lax.fori_loop(0, count, one, (state, neighbors))

        return steps

    def _cell(self, state: State) -> Array:
        cell = self._ensemble.cell
        return state.cell if cell is None else jax.vmap(cell)(state.md)

    def _observed(self, state: State) -> Frame:
        ensemble, cell = self._ensemble, self._cell(state)
        kinetic = jax.vmap(kinetic_energy)(state.md)
        potential = state.last.energy
        nothing = jnp.full_like(potential, jnp.nan)
        conserved = nothing
        if ensemble.invariant is not None:
            conserved = jax.vmap(ensemble.invariant)(state.md, potential)
        volume = pressure = nothing
        if self.system.pbc.all():
            volume = jnp.abs(jnp.linalg.det(cell))
            virial = jnp.trace(state.last.virial, axis1=1, axis2=2)
            pressure = (2 * kinetic - virial) / (3 * volume)
        return Frame(
            jax.vmap(ensemble.positions)(state.md),
            state.md.momentum,
            -state.last.gradients,
            cell,
            potential,
            kinetic,
            conserved,
            2 * kinetic / (ensemble.degrees_of_freedom * self._kb),
            pressure,
            volume,
        )
