"""Measures `torchcall.mliap` for `md_loop.py`: parts of a step, narrowing, merged systems."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _harness import Report, Run, graph_of, jitted_loop, liquid

from torchcall.demo._dynamics import Constants, State
from torchcall.demo._system import load_example
from torchcall.demo._timing import timed
from torchcall.mliap import AtomGraph, TorchMliap, energy_and_gradients, pad_graph

REPLICAS = 64
# With one thread, the time of a call is dispatch plus arithmetic, and merging saves the dispatch.
# For 64 atoms that is nearly all of Stillinger-Weber's many small operations, half of the
# network's, and nothing for Lennard-Jones' few operations on 3582 edges.
LEAST_GAIN = {"Stillinger-Weber": 4.0, "message passing": 1.5}


def shares(model: TorchMliap, state: State, constants: Constants, cutoff: float) -> dict[str, Run]:
    """A whole step; a step without the list's update; and one without list and padding.

    The cost of a part is the difference of two. Measured alone, XLA would remove what is not used
    and hoist what does not change out of the loop.
    """
    fixed, masks = pad_graph(graph_of_list(state, constants), cutoff=cutoff)

    def with_list(state: State) -> State:
        neighbors = state.neighbors.update(state.positions, constants.cell)
        return with_graph(state._replace(neighbors=neighbors))

    def with_graph(state: State) -> State:
        # The count depends on the positions, so the graph is padded in each step.
        lost = jnp.where(state.positions[0, 0] > 1e9, 1, 0)
        neighbors = replace(state.neighbors, n_edges=state.neighbors.n_edges - lost)
        graph = graph_of_list(state._replace(neighbors=neighbors), constants)
        return integrate(state, energy_and_gradients(model, graph).position_gradients)

    def with_model(state: State) -> State:
        rows = fixed["pos"].at[: len(state.positions)].set(state.positions)
        gradients = evaluate(model, fixed | {"pos": rows}, masks)
        return integrate(state, gradients[: len(state.positions)])

    def integrate(state: State, gradients: jax.Array) -> State:
        velocities = state.velocities - 1e-3 * gradients / constants.masses[:, None]
        return state._replace(
            positions=state.positions + 1e-3 * velocities,
            velocities=velocities,
            gradients=gradients,
        )

    steps = {
        "a step": with_list,
        "a step, list kept": with_graph,
        "a step, list and graph kept": with_model,
    }
    return {name: state_loop(step, state) for name, step in steps.items()}


def state_loop(step: Callable[[State], State], state: State) -> Run:
    """`run(calls)`: that many steps inside one jitted `fori_loop`."""

    @jax.jit
    def loop(calls: jax.Array, state: State) -> State:
        return jax.lax.fori_loop(0, calls, lambda _, state: step(state), state)

    return lambda calls: timed(lambda: jax.block_until_ready(loop(calls, state)))


def evaluate(model: TorchMliap, padded: Any, masks: Any) -> Any:
    """The gradients of a padded graph."""
    return model.evaluate(padded, masks.n_atoms, masks.n_edges)["position_gradients"]


def graph_of_list(state: State, constants: Constants) -> AtomGraph:
    """The graph of a state."""
    return AtomGraph(
        positions=state.positions,
        atomic_numbers=constants.atomic_numbers,
        cell=constants.cell,
        pbc=constants.pbc,
        batch=None,
        edge_index=state.neighbors.edge_index,
        cell_offsets=state.neighbors.cell_offsets,
        n_edges=state.neighbors.n_edges,
    )


def narrowing(report: Report, n_atoms: int) -> None:
    """The model call on a graph with twice the edge slots, and on one without spare slots."""
    cutoff = 8.5
    module = torch.jit.script(load_example("lennard_jones").LennardJones(cutoff=cutoff).eval())
    model = TorchMliap.from_module(module, cutoff, requires_grad=False)
    runs: dict[str, Run] = {}
    for name, slack, narrow in (
        ("exact graph", 1.0, "auto"),
        ("twice the edge slots", 2.0, "auto"),
        ("twice the edge slots, narrow=False", 2.0, False),
    ):
        padded, masks = pad_graph(graph_of(*liquid(n_atoms), cutoff, slack=slack), cutoff=cutoff)

        call = partial(evaluate, replace(model, narrow=narrow))
        runs[name] = jitted_loop(call, (padded, masks), lambda: model.wrapper.stats()["calls"])
    case = f"narrowing, Lennard-Jones, {n_atoms} atoms"
    timings = report.time(case, runs)
    ratio = timings["twice the edge slots"].us_median / timings["exact graph"].us_median
    report.claim(case, "twice the edge slots / exact graph", ratio, 1.05)


def potentials() -> dict[str, tuple[Any, float]]:
    """The examples' modules, each with its cutoff."""
    silicon = load_example("stillinger_weber").StillingerWeber()
    return {
        "Lennard-Jones": (load_example("lennard_jones").LennardJones(cutoff=8.5), 8.5),
        "Stillinger-Weber": (silicon, float(silicon.cutoff)),
        "message passing": (load_example("message_passing").MessagePassing(cutoff=4.0), 4.0),
    }


def batched(report: Report, n_atoms: int) -> None:
    """64 small systems: merged by `vmap` into one call of the model, and one after another."""
    for name, (module, cutoff) in potentials().items():
        positions, cell = liquid(n_atoms)
        moves = np.random.default_rng(1).normal(scale=0.02, size=(REPLICAS, n_atoms, 3))
        graph = graph_of(positions, cell, cutoff, slack=1.1)
        replicas = jnp.asarray(positions + moves, jnp.float32)
        differentiates = name != "Lennard-Jones"
        model = TorchMliap.from_module(
            torch.jit.script(module.eval()), cutoff, requires_grad=differentiates
        )

        def one(positions: Any, graph: AtomGraph, model: TorchMliap = model) -> Any:
            return energy_and_gradients(model, replace(graph, positions=positions)).energy

        def merged(replicas: Any, graph: AtomGraph, one: Any = one) -> Any:
            return jax.vmap(one, (0, None))(replicas, graph)

        def in_sequence(replicas: Any, graph: AtomGraph, one: Any = one) -> Any:
            return jax.lax.map(partial(one, graph=graph), replicas)

        def calls(per: int, wrapper: Any = model.wrapper) -> Callable[[], int]:
            return lambda: wrapper.stats()["calls"] // per

        edges = int(np.asarray(graph.n_edges))
        case = f"{REPLICAS} systems of {n_atoms} atoms and {edges} edges, {name}"
        runs = {
            "merged by vmap": jitted_loop(merged, (replicas, graph), calls(1)),
            "one after another": jitted_loop(in_sequence, (replicas, graph), calls(REPLICAS)),
        }
        timings = report.time(case, runs)
        ratio = timings["one after another"].us_median / timings["merged by vmap"].us_median
        if name in LEAST_GAIN:
            report.claim(case, "one after another / merged", ratio, LEAST_GAIN[name], at_most=False)
