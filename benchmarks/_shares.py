"""A step of molecular dynamics in nested parts, and what bounds it from below."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _dynamics import Constants, State
from _harness import Run, jitted_loop, memcpy_loop, tensors_of
from _native_loop import package_loop, script_loop

from torchcall.mliap import (
    AtomGraph,
    AtomGraphInput,
    TorchMliap,
    energy_and_gradients,
    pad_graph,
)

# Each contains the ones before it.
LOOP, INTEGRATOR, CALL, GRAPH, LIST, STEP = (
    "the loop alone",
    "and the integrator",
    "and the call of the model",
    "and the graph",
    "and the list within its skin",
    "and its searches: a step",
)
ALONE, NATIVE, MEMCPY = "the call alone", "the model in a C++ loop", "memcpy of a step's bytes"


def nested(model: TorchMliap, state: State, constants: Constants, dt: float) -> dict[str, Run]:
    """Loops over growing parts of a velocity Verlet step; the last is a whole step.

    The cost of a part is the difference of two. Measured alone, XLA would remove what is not used
    and hoist what does not change out of the loop. Every run starts from the same state.

    Args:
        model: the potential.
        state: where runs start; gradients at its positions.
        constants: the run's constant arrays.
        dt: time step in ASE's unit of time; nearly zero in `LIST`, so that nothing is searched.
    """
    exact = exact_graph(model.cutoff, state, constants)
    given = model, constants, exact

    whole = state_loop(verlet(_with_list))
    runs = {
        LOOP: state_loop(lambda state, *_: jax.lax.optimization_barrier(state)),
        INTEGRATOR: state_loop(verlet(_kept_gradients)),
        CALL: state_loop(verlet(_call)),
        GRAPH: state_loop(verlet(_with_graph)),
        LIST: whole,
        STEP: whole,
    }
    return {
        name: partial(timed_steps, loop, state, given, 1e-6 * dt if name == LIST else dt)
        for name, loop in runs.items()
    }


def verlet(gradients: Callable[..., Any]) -> Callable[[State, Any, Any], State]:
    """A velocity Verlet step with `(neighbors, gradients) = gradients(state, positions, given)`."""

    def step(state: State, dt: Any, given: Any) -> State:
        mass = given[1].masses[:, None]
        velocities = state.velocities - 0.5 * dt * state.gradients / mass
        positions = state.positions + dt * velocities
        neighbors, found = gradients(state, positions, given)
        return State(positions, velocities - 0.5 * dt * found / mass, found, neighbors)

    return step


def _kept_gradients(state: State, positions: jax.Array, given: Any) -> Any:
    del positions, given
    return state.neighbors, jax.lax.optimization_barrier(state.gradients)


def _call(state: State, positions: jax.Array, given: Any) -> Any:
    model, _, exact = given
    rows = exact["pos"].at[: len(positions)].set(positions)
    gradients = model.call(exact | {"pos": rows})["position_gradients"]
    return state.neighbors, gradients[: len(positions)]


def _with_graph(state: State, positions: jax.Array, given: Any) -> Any:
    model, constants, _ = given
    # The barrier's results depend on the positions: XLA cannot hoist the graph out of the loop.
    kept, positions = jax.lax.optimization_barrier((state.neighbors, positions))
    graph = _graph(kept, positions, constants)
    return kept, energy_and_gradients(model, graph).position_gradients


def _with_list(state: State, positions: jax.Array, given: Any) -> Any:
    model, constants, _ = given
    neighbors = state.neighbors.update(positions, constants.cell)
    graph = AtomGraph.from_neighbors(neighbors, positions, constants.cell, constants.atomic_numbers)
    return neighbors, energy_and_gradients(model, graph).position_gradients


def state_loop(step: Callable[..., State]) -> Callable[..., State]:
    """`loop(steps, state, dt, given)`: that many steps inside one jitted `fori_loop`."""

    def loop(steps: jax.Array, state: State, dt: jax.Array, given: Any) -> State:
        return jax.lax.fori_loop(0, steps, lambda _, state: step(state, dt, given), state)

    return jax.jit(loop)


def timed_steps(
    loop: Callable[..., State], state: State, given: Any, dt: float, steps: int
) -> float:
    """Seconds of a loop from the state.

    Raises:
        RuntimeError: the neighbour list overflowed.
    """
    length = jnp.asarray(dt, state.positions.dtype)
    begun = time.perf_counter()
    end = jax.block_until_ready(loop(steps, state, length, given))
    seconds = time.perf_counter() - begun
    if bool(end.neighbors.did_overflow):
        raise RuntimeError("torchcall: expected a neighbour list that fits, got an overflow")
    return seconds


def _graph(neighbors: Any, positions: jax.Array, constants: Constants) -> AtomGraph:
    """The graph of a list for positions that it was not updated at."""
    numbers = constants.atomic_numbers
    return AtomGraph.from_neighbors(
        neighbors, positions, constants.cell, numbers, check_moved=False
    )


def exact_graph(cutoff: Any, state: State, constants: Constants) -> AtomGraphInput:
    """The model's input at the state, without spare slots: what a narrowed call sees."""
    n_edges = int(state.neighbors.n_edges)
    listed = AtomGraph(
        positions=state.positions,
        atomic_numbers=constants.atomic_numbers,
        cell=constants.cell,
        pbc=constants.pbc,
        batch=None,
        edge_index=state.neighbors.edge_index[:, :n_edges],
        cell_offsets=state.neighbors.cell_offsets[:n_edges],
    )
    return pad_graph(listed, cutoff=cutoff)[0]


def with_gradients(model: TorchMliap, state: State, constants: Constants) -> State:
    """The state with ∂E/∂r at its positions."""
    graph = _graph(state.neighbors, state.positions, constants)
    return state._replace(gradients=jax.jit(energy_and_gradients)(model, graph).position_gradients)


def bounds(
    model: TorchMliap,
    module: torch.jit.ScriptModule | None,
    state: State,
    constants: Constants,
    requires_grad: bool = False,
) -> dict[str, Run]:
    """The call alone in a jitted loop, the model in a C++ loop, and the memory traffic of a step.

    Args:
        model: the potential.
        module: its TorchScript module; None for a package.
        state, constants: the system.
        requires_grad: whether the module differentiates internally.
    """
    exact = exact_graph(model.cutoff, state, constants)
    tensors = (tensors_of(exact),)
    if module is None:
        native = package_loop(str(model.wrapper._source.path), tensors)
    else:
        native = script_loop(module, tensors, requires_grad=requires_grad)
    return {
        ALONE: jitted_loop(model.call, (exact,), lambda: model.wrapper.stats()["calls"]),
        NATIVE: native,
        MEMCPY: memcpy_loop(step_bytes(exact)),
    }


def step_bytes(exact: AtomGraphInput) -> int:
    """The least that a step must write: positions, velocities, gradients, and the model's edges."""
    n_edges, width = exact["edge_index"].shape[1], np.dtype(exact["pos"].dtype).itemsize
    return 3 * exact["pos"].nbytes + n_edges * (2 * 8 + 3 * width)
