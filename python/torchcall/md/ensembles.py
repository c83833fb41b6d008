"""The ensembles of `jax_md.simulate`, each written for one replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax_md import quantity, simulate
from jaxtyping import Array

from torchcall.md.evaluation import One, energy_fn, force_fn

State = Any
"""A state of jax-md; has `momentum`, `force` and `mass`."""


@dataclass(frozen=True)
class Ensemble:
    """Functions of one replica.

    Attributes:
        init: `(key, positions, momenta, mass, cell, context) → state`; context: `Context`.
        step: `(state, context) → state`. Evaluates the model once, at the new positions.
        positions: state → (N, 3), in Å.
        cell: state → (3, 3), rows are lattice vectors in Å; None: the cell does not change.
        invariant: `(state, potential energy) → ()`, the conserved quantity in eV; None for
            stochastic dynamics.
        degrees_of_freedom: For the temperature.
    """

    init: Callable[..., State]
    step: Callable[..., State]
    positions: Callable[[State], Array]
    cell: Callable[[State], Array] | None
    invariant: Callable[[State, Array], Array] | None
    degrees_of_freedom: int


@dataclass(frozen=True)
class Settings:
    """Units of ASE: time in Å √(u/eV).

    Attributes:
        ensemble: "nve", "nvt" or "npt".
        thermostat: "nose-hoover" or "langevin"; of nvt.
        timestep: Time.
        thermal_energy: k T in eV.
        pressure: In eV/Å³; of npt.
        friction: 1/time; of Langevin.
    """

    ensemble: str
    thermostat: str
    timestep: float
    thermal_energy: float
    pressure: float
    friction: float


def make_ensemble(settings: Settings, one: Callable[..., One], n_atoms: int) -> Ensemble:
    """The ensemble of these settings.

    Args:
        settings: See `Settings`.
        one: From `torchcall.md.evaluation.mapped`.
        n_atoms: Of one replica.
    """
    # Momentum is conserved, except by Langevin's friction.
    free = 3 * n_atoms - 3 if n_atoms > 1 else 3
    if settings.ensemble == "npt":
        return _npt(settings, one, free)
    force, dt, kT = force_fn(one), settings.timestep, settings.thermal_energy
    conserved: Callable[[State, Array], Array] | None = _total
    if settings.ensemble == "nve":
        init_nve, step = simulate.nve(force, _shift, dt)
        init = partial(_without_temperature, init_nve)
    elif settings.thermostat == "langevin":
        init, step = simulate.nvt_langevin(force, _shift, dt, kT, settings.friction)
        conserved, free = None, 3 * n_atoms
    else:
        init_chain, step = simulate.nvt_nose_hoover(force, _shift, dt, kT)
        init = partial(_with_chain, init_chain, free)
        conserved = partial(_total_with_chain, kT)
    return Ensemble(init, _inline(step), lambda state: state.position, None, conserved, free)


def _total_with_chain(kT: float, state: State, potential: Array) -> Array:
    return _total(state, potential) + _chain(state.chain, kT)


def _without_temperature(
    init_nve: Any, key: Array, positions: Array, *, momenta: Array, **others: Any
) -> State:
    return init_nve(key, positions, 0.0, momenta=momenta, **others)


def _with_chain(init_chain: Any, free: int, key: Array, positions: Array, **others: Any) -> State:
    """jax-md counts three degrees of freedom too many where momentum is conserved."""
    state = init_chain(key, positions, **others)
    return state.set(chain=state.chain.set(degrees_of_freedom=free))


def _inline(jitted: Any) -> Callable[..., State]:
    """The function without its own `jit`, to see its evaluation while it is traced."""
    return jitted.__wrapped__


def _npt(settings: Settings, one: Callable[..., One], free: int) -> Ensemble:
    kT, pressure = settings.thermal_energy, settings.pressure
    energy, dt = energy_fn(one), settings.timestep

    def init(
        key: Array, positions: Array, momenta: Array, mass: Array, cell: Array, **now: Any
    ) -> State:
        fractional = jnp.dot(positions, jnp.linalg.inv(cell), precision="highest")
        nothing = One(jnp.zeros((), cell.dtype), positions, cell)  # not used by forces
        init_npt, _ = simulate.npt_nose_hoover(energy, _no_shift, dt, pressure, kT)
        state: Any = init_npt(
            key, fractional, cell.T, mass=mass, momenta=momenta, last=nothing, **now
        )
        return state.set(thermostat=state.thermostat.set(degrees_of_freedom=free))

    def step(state: State, cell: Array, **now: Any) -> State:
        del cell  # it is the state's
        old = quantity.volume(3, state.box)

        def shift(fractional: Array, moves: Array, **given: Any) -> Array:
            box = given["box"]
            moves = moves - with_box(fractional, old, quantity.volume(3, box))
            return fractional + jnp.dot(moves, jnp.linalg.inv(box).T, precision="highest")

        _, step_npt = simulate.npt_nose_hoover(energy, shift, dt, pressure, kT)
        return step_npt(state, **now)

    def cell(state: State) -> Array:
        return state.box.T

    def positions(state: State) -> Array:
        return jnp.dot(state.position, state.box.T, precision="highest")

    def invariant(state: State, potential: Array) -> Array:
        volume = quantity.volume(3, state.box)
        box = state.box_momentum**2 / (2 * state.box_mass)
        chains = _chain(state.thermostat, kT) + _chain(state.barostat, kT)
        return _total(state, potential) + chains + pressure * volume + box

    return Ensemble(init, step, positions, cell, invariant, free)


def with_box(fractional: Array, old: Array, new: Array) -> Array:
    """jax-md's movement of atoms with a box whose volume changes: R (eˣ − 1).

    It adds this to fractional coordinates, which move with the box already. So it is subtracted
    again.
    """
    return fractional * ((new / old) ** (1 / 3) - 1)


def kinetic_energy(state: State) -> Array:
    """In eV."""
    return 0.5 * jnp.sum(state.momentum**2 / state.mass)


def _total(state: State, potential: Array) -> Array:
    return potential + kinetic_energy(state)


def _chain(chain: Any, kT: float) -> Array:
    """The energy of a Nosé–Hoover chain."""
    heat = kT * (chain.degrees_of_freedom * chain.position[0] + jnp.sum(chain.position[1:]))
    return jnp.sum(chain.momentum**2 / (2 * chain.mass)) + heat


def _shift(positions: Array, moves: Array, **_: Any) -> Array:
    """Positions are not wrapped: displacements over the whole run stay visible."""
    return positions + moves


def _no_shift(*_: Any, **__: Any) -> Array:
    raise AssertionError("an initial state needs no shift")


def keys(seed: int, replicas: int) -> Array:
    """(R, 2) uint32, a random key for each replica."""
    return jax.random.split(jax.random.PRNGKey(seed), replicas)
