"""NVE molecular dynamics in one jitted `lax.scan`: velocity Verlet with a neighbour list."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from _argon import Structure
from jaxtyping import Array, Bool, Float, Int

from torchcall.demo._timing import Run, timed
from torchcall.mliap import AtomGraph, AtomGraphInput, neighbor_list, pad_graph

Model = Callable[[AtomGraphInput], dict[str, Array]]
"""A module with the interface of `TorchMliapForward`, callable from JAX."""


class Constants(NamedTuple):
    """Constant arrays. Passed as arguments: XLA rebuilds closed-over constants in each step."""

    atomic_numbers: Int[Array, " n"]
    masses: Float[Array, " n"]
    cell: Float[Array, "1 3 3"]
    pbc: Bool[Array, "1 3"]


class State(NamedTuple):
    """The arrays that a step updates."""

    positions: Float[Array, "n 3"]
    velocities: Float[Array, "n 3"]
    gradients: Float[Array, "n 3"]
    neighbors: Any


class Energies(NamedTuple):
    """Potential and kinetic energy in eV, per step."""

    potential: Float[Array, " steps"]
    kinetic: Float[Array, " steps"]


def start(
    structure: Structure, *, cutoff: float, skin: float, dtype: Any
) -> tuple[State, Constants]:
    """The initial arrays. Gradients are zero: see `with_gradients`.

    Args:
        structure: The atoms.
        cutoff: The model's cutoff in Å.
        skin: The neighbour list's skin in Å.
        dtype: Of all floats.
    """
    constants = Constants(
        atomic_numbers=jnp.asarray(structure.atomic_numbers, jnp.int32),
        masses=jnp.asarray(structure.masses, dtype),
        cell=jnp.asarray(structure.cell, dtype)[None],
        pbc=jnp.asarray(structure.pbc)[None],
    )
    positions = jnp.asarray(structure.positions, dtype)
    batch = jnp.zeros(len(structure.positions), jnp.int32)
    search = neighbor_list(cutoff, skin=skin, capacity_multiplier=1.1)
    neighbors = search.allocate(positions, constants.cell, constants.pbc, batch)
    velocities = jnp.asarray(structure.velocities, dtype)
    return State(positions, velocities, jnp.zeros_like(positions), neighbors), constants


def graph_of(
    positions: Float[Array, "n 3"], neighbors: Any, constants: Constants, cutoff: float
) -> AtomGraphInput:
    """The model's input for these positions."""
    graph = AtomGraph.from_neighbors(neighbors, positions, constants.cell, constants.atomic_numbers)
    return pad_graph(graph, cutoff=cutoff)[0]


def with_gradients(model: Model, state: State, constants: Constants, cutoff: float) -> State:
    """The state with ∂E/∂r at its positions."""
    _, gradients = jax.jit(_evaluate, static_argnums=(0, 4))(
        model, state.positions, state.neighbors, constants, cutoff
    )
    return state._replace(gradients=gradients)


def make_run(model: Model, *, cutoff: float, dt: float) -> Any:
    """`run(state, constants, n_steps)`, a jitted scan of velocity Verlet steps.

    Args:
        model: Called once per step.
        cutoff: The model's cutoff in Å.
        dt: Time step in ASE's unit of time (Å √(u/eV)).

    Returns:
        The jitted function. `n_steps` is static. Returns the final state and the energies.
    """

    def step(constants: Constants, state: State) -> tuple[State, tuple[Array, Array]]:
        mass = constants.masses[:, None]
        velocities = state.velocities - (0.5 * dt) * state.gradients / mass
        positions = state.positions + dt * velocities
        neighbors = state.neighbors.update(positions, constants.cell)
        potential, gradients = _evaluate(model, positions, neighbors, constants, cutoff)
        velocities = velocities - (0.5 * dt) * gradients / mass
        kinetic = 0.5 * jnp.sum(mass * velocities**2)
        return State(positions, velocities, gradients, neighbors), (potential, kinetic)

    def run(state: State, constants: Constants, n_steps: int) -> tuple[State, Energies]:
        state, energies = jax.lax.scan(lambda s, _: step(constants, s), state, length=n_steps)
        return state, Energies(*energies)

    return jax.jit(run, static_argnames="n_steps")


def compiled_runs(
    models: Mapping[str, Model],
    state: State,
    constants: Constants,
    n_steps: int,
    *,
    cutoff: float,
    dt: float,
) -> dict[str, Run]:
    """For each model, a compiled run of exactly `n_steps` from this state."""

    def compiled(model: Model) -> Run:
        lowered = make_run(model, cutoff=cutoff, dt=dt).lower(state, constants, n_steps=n_steps)
        executable = lowered.compile()

        def timed_run(calls: int) -> float:
            assert calls == n_steps
            return timed(lambda: jax.block_until_ready(executable(state, constants)))

        return timed_run

    # XLA compiles without the GIL, so two threads compile at once.
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(models, pool.map(compiled, models.values()), strict=True))


def _evaluate(
    model: Model, positions: Array, neighbors: Any, constants: Constants, cutoff: float
) -> tuple[Float[Array, ""], Float[Array, "n 3"]]:
    """Potential energy in eV and ∂E/∂r in eV/Å of the real atoms."""
    out = model(graph_of(positions, neighbors, constants, cutoff))
    return out["energy"][0], out["position_gradients"][: positions.shape[0]]
