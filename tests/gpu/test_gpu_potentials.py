"""Potentials on a GPU: energies and gradients, neighbour lists, transformations, simulations."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gpu_models import ON_CPU, assert_replayed
from gpu_systems import (
    CUTOFF,
    POTENTIALS,
    SEARCH,
    graph_of,
    graph_on,
    graphs_on,
    reference,
    systems,
)

from torchcall.mliap import TorchMliap, energy, energy_and_gradients

pytestmark = pytest.mark.gpu
ENGINES = ("TorchScript", "eager")


def potential(name, engine, **options):
    """A potential on an engine."""
    module = POTENTIALS[name]()
    if engine == "TorchScript":
        module = torch.jit.script(module)
    return TorchMliap.from_module(module, CUTOFF, True, **options)


@pytest.mark.parametrize("cuda_graph", ["off", "auto"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", POTENTIALS)
def test_energies_and_gradients_equal_torch(name, engine, cuda_graph, device):
    model = potential(name, engine, cuda_graph=cuda_graph)
    evaluate = jax.jit(energy_and_gradients)
    for arrays, graph in graphs_on(device, 4):
        found = evaluate(model, graph)
        right = reference(POTENTIALS[name](), *arrays)
        for key in ("energy", "position_gradients", "cell_gradients"):
            scale = np.abs(right[key]).max()
            np.testing.assert_allclose(getattr(found, key), right[key], atol=2e-4 * scale)
    if cuda_graph == "auto":
        assert_replayed(model.wrapper, 4)


@pytest.mark.parametrize("engine", ["TorchScript", "eager"])
def test_replays_of_a_potential_equal_the_uncaptured_model(engine, device):
    """Up to rounding: sums over edges are atomic on a GPU, in varying order."""
    graph, _ = graph_on(device, *systems())
    off = potential("message passing", engine, cuda_graph="off")
    auto = potential("message passing", engine, cuda_graph="auto")
    plain = jax.jit(energy_and_gradients)(off, graph)
    for _ in range(4):
        replayed = jax.jit(energy_and_gradients)(auto, graph)
        for a, b in zip(jax.tree.leaves(replayed), jax.tree.leaves(plain), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert auto.wrapper.stats()["graph_captures"] == (0 if ON_CPU else 1)


def test_jax_derivatives_use_the_models_gradients(device):
    model = potential("Lennard-Jones", "TorchScript")
    graph, _ = graph_on(device, *systems())
    before = model.wrapper.stats()["calls"]
    total = jax.jit(jax.value_and_grad(lambda r: energy(model, replace(graph, positions=r)).sum()))
    value, gradient = jax.block_until_ready(total(graph.positions))
    assert model.wrapper.stats()["calls"] == before + 1
    out = energy_and_gradients(model, graph)
    np.testing.assert_allclose(value, out.energy.sum(), rtol=1e-4)
    np.testing.assert_allclose(gradient, out.position_gradients, rtol=1e-3, atol=1e-5)


def test_vmapped_graphs_are_one_call(device):
    model = potential("message passing", "TorchScript")
    graph, _ = graph_on(device, *systems())
    moved = jnp.stack([systems(seed, move=0.02)[0] for seed in range(5)])
    one = lambda r: energy_and_gradients(model, replace(graph, positions=r))  # noqa: E731
    before = model.wrapper.stats()["calls"]
    merged = jax.block_until_ready(jax.jit(jax.vmap(one))(moved))
    assert model.wrapper.stats()["calls"] == before + 1
    for k in range(5):
        single = jax.jit(one)(moved[k])
        np.testing.assert_allclose(merged.energy[k], single.energy, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(
            merged.position_gradients[k], single.position_gradients, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("narrow", ["auto", False])
def test_padding_changes_nothing(narrow, device):
    """On a GPU the module always sees padded shapes: narrowing would synchronise."""
    model = potential("message passing", "TorchScript", narrow=narrow)
    graph, _ = graph_on(device, *systems())
    n_edges = int(graph.n_edges)
    plain = jax.jit(energy_and_gradients)(model, graph)
    more = 40
    unused = jnp.tile(jnp.array([1.0, 0.0, 0.0]), (more, 1))
    padded = replace(
        graph,
        edge_index=jnp.pad(graph.edge_index, ((0, 0), (0, more)), constant_values=35),
        cell_offsets=jnp.concatenate([graph.cell_offsets, unused]),
    )
    assert padded.edge_index.shape[1] > n_edges
    wide = jax.jit(energy_and_gradients)(model, padded)
    for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_neighbor_lists_equal_the_cpu(device):
    def edges_on(device):
        _, neighbors = graph_on(device, *systems())
        with jax.default_device(device):
            moved = systems(1, move=0.05)
            neighbors = jax.jit(lambda n, r, h: n.update(r, h))(neighbors, moved[0], moved[1])
        n = int(neighbors.n_edges)
        assert not bool(neighbors.did_overflow)
        edges, offsets = np.asarray(neighbors.edge_index), np.asarray(neighbors.cell_offsets)
        return sorted(map(tuple, np.concatenate([edges.T, offsets], 1)[:n].tolist()))

    assert edges_on(device) == edges_on(jax.devices("cpu")[0])


@pytest.mark.parametrize("engine", ["TorchScript", "eager"])
def test_a_simulation_conserves_energy(engine, device):
    model = potential("Lennard-Jones", engine)
    arrays = [jax.device_put(a, device) for a in systems()]
    positions, cell, pbc, batch = arrays
    neighbors = SEARCH.allocate(*arrays)
    dt, mass = 0.04, 40.0

    def step(carry, _):
        r, v, g, nbrs = carry
        v = v - 0.5 * dt / mass * g
        r = r + dt * v
        nbrs = nbrs.update(r, cell)
        out = energy_and_gradients(model, graph_of((r, cell, pbc, batch), nbrs))
        g = out.position_gradients
        v = v - 0.5 * dt / mass * g
        return (r, v, g, nbrs), out.energy.sum() + 0.5 * mass * jnp.sum(v * v)

    @jax.jit
    def run(r, nbrs):
        g = energy_and_gradients(model, graph_of((r, cell, pbc, batch), nbrs)).position_gradients
        still = replace(nbrs.rebuild(r, cell), schedule="never")
        return jax.lax.scan(step, (r, jnp.zeros_like(r), g, still), None, length=100)

    (r, _, _, nbrs), total = run(positions, neighbors)
    assert not bool(nbrs.did_overflow)
    moved = float(jnp.abs(r - positions).max())
    assert moved > 0.01
    total = np.asarray(total, float)
    assert np.ptp(total) < 1e-3 * max(abs(total).max(), 1.0)
    assert model.wrapper.stats()["calls"] == 101
