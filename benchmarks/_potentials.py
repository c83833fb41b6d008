"""Measures `torchcall.mliap` for `md_loop.py`: narrowing, merged systems."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _harness import Report, Run, graph_of, jitted_loop, liquid

from torchcall._command.included import load_example
from torchcall.mliap import AtomGraph, TorchMliap, energy_and_gradients, pad_graph

REPLICAS = 64
# With one thread, the time of a call is dispatch plus arithmetic, and merging saves the dispatch.
# For 64 atoms that is nearly all of Stillinger-Weber's many small operations, half of the
# network's, and nothing for Lennard-Jones' few operations on 3582 edges.
LEAST_GAIN = {"Stillinger-Weber": 4.0, "message passing": 1.5}


def evaluate(model: TorchMliap, padded: Any, masks: Any) -> Any:
    """The gradients of a padded graph."""
    return model.evaluate(padded, masks.n_atoms, masks.n_edges)["position_gradients"]


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
