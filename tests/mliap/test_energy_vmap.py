"""`vmap` merges graphs into one batched graph: one call of the model, equal to a Python loop."""

from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from graphs import QUICK
from reference import one_thread  # noqa: F401

from torchcall.mliap import AtomGraph, energy, energy_and_gradients

pytestmark = pytest.mark.usefixtures("x64")
COUNT = 3
FIELDS = ["positions", "atomic_numbers", "cell", "batch", "edges", "charge"]


@pytest.fixture(scope="module")
def model():
    return graphs.potential("message passing")


@pytest.fixture(scope="module")
def replicas():
    """Graphs of equal shapes with different positions, cells, elements, order and edge counts."""
    with jax.enable_x64(True):
        made = []
        for k in range(COUNT):
            members = [reference.distorted(30 + k), reference.distorted(40 + k)]
            graph = graphs.atom_graph(members)
            graph, _ = graphs.shuffled(graph, k, padding=2)
            room = 900 - graph.edge_index.shape[1]
            index = jnp.pad(graph.edge_index, ((0, 0), (0, room)), constant_values=18)
            offsets = jnp.pad(graph.cell_offsets, ((0, room), (0, 0)), constant_values=5)
            charge = jnp.asarray([0.1, 0.2]) * k
            made.append(replace(graph, edge_index=index, cell_offsets=offsets, charge=charge))
        return made


@pytest.fixture(scope="module")
def stacked(replicas):
    with jax.enable_x64(True):
        return jax.tree.map(lambda *x: jnp.stack(x), *replicas)


def of(model, graph):
    def total(positions, cell):
        energies = energy(model, replace(graph, positions=positions, cell=cell))
        return energies.sum(), energies

    (_, energies), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(
        graph.positions, graph.cell
    )
    return energies, *gradients


@pytest.fixture(scope="module")
def looped(model, replicas):
    with jax.enable_x64(True):
        outs = [energy_and_gradients(model, graph) for graph in replicas]
        return tuple(np.stack(x) for x in zip(*outs, strict=True))


def calls_of(model, function, *args):
    compiled = jax.jit(function).lower(*args).compile(QUICK)
    before = model.wrapper.stats()["calls"]
    out = jax.block_until_ready(compiled(*args))
    return model.wrapper.stats()["calls"] - before, out


def assert_close(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(1.0, abs(np.asarray(y)).max()))


def test_mapped_evaluation_is_one_call(model, stacked, looped):
    count, out = calls_of(model, jax.vmap(lambda g: energy_and_gradients(model, g)), stacked)
    assert count == 1
    assert_close(out, looped)


def test_vmap_of_grad_is_one_call(model, stacked, looped):
    count, out = calls_of(model, jax.vmap(lambda g: of(model, g)), stacked)
    assert count == 1
    assert_close(out, looped)


def test_grad_of_vmap_is_one_call(model, stacked, looped):
    def total(positions, cell):
        graph = replace(stacked, positions=positions, cell=cell)
        return jax.vmap(lambda g: energy(model, g))(graph).sum()

    gradients = jax.grad(total, (0, 1))
    count, out = calls_of(model, gradients, stacked.positions, stacked.cell)
    assert count == 1
    assert_close(out, looped[1:])
    text = jax.jit(gradients).lower(stacked.positions, stacked.cell).as_text()
    assert text.count("custom_call @torchcall") == 1


def test_jvp_under_vmap_is_one_call(model, stacked, looped):
    direction = jnp.asarray(np.random.default_rng(0).normal(size=stacked.positions.shape))

    def push(graph, move):
        def energies(x):
            return energy(model, replace(graph, positions=x))

        return jax.jvp(energies, (graph.positions,), (move,))

    count, (value, slope) = calls_of(model, jax.vmap(push), stacked, direction)
    assert count == 1
    n_systems = stacked.cell.shape[1]
    by_atom = np.einsum("rnk,rnk->rn", looped[1], direction)
    batch = np.asarray(stacked.batch)
    expected = [
        np.bincount(b, w, n_systems + 1)[:n_systems] for b, w in zip(batch, by_atom, strict=True)
    ]
    assert_close((value, slope), (looped[0], np.stack(expected)))


def test_nested_vmap_is_one_call(model, stacked, looped):
    twice = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), stacked)
    count, out = calls_of(model, jax.vmap(jax.vmap(lambda g: of(model, g))), twice)
    assert count == 1
    assert_close(out, [np.stack([x, x[::-1]]) for x in looped])


def test_vmap_in_scan_is_one_call_per_step(model, stacked):
    def at(positions):
        return jax.vmap(lambda g: of(model, g))(replace(stacked, positions=positions))

    def step(positions, _):
        return positions * 1.001, at(positions)

    count, (_, out) = calls_of(model, lambda x: jax.lax.scan(step, x, length=3), stacked.positions)
    assert count == 3
    alone = [at(stacked.positions * 1.001**k) for k in range(3)]
    assert_close(out, [np.stack(x) for x in zip(*alone, strict=True)])


def test_empty_graphs_are_merged(model):
    cells = 9.0 * jnp.ones((COUNT, 1, 1, 1)) * jnp.eye(3)

    def one(cell):
        graph = AtomGraph(
            positions=jnp.zeros((0, 3)),
            atomic_numbers=jnp.zeros(0, jnp.int32),
            cell=cell,
            pbc=jnp.ones((1, 3), bool),
            batch=jnp.zeros(0, jnp.int32),
            edge_index=jnp.zeros((2, 0), jnp.int32),
            cell_offsets=jnp.zeros((0, 3)),
            n_edges=jnp.int32(0),
        )
        return energy_and_gradients(model, graph)

    out = jax.vmap(one)(cells)
    assert out.energy.shape == (COUNT, 1)
    assert out.position_gradients.shape == (COUNT, 0, 3)
    assert not np.asarray(out.cell_gradients).any()


@pytest.mark.parametrize("mapped", FIELDS)
def test_any_subset_of_fields_may_be_mapped(model, replicas, stacked, mapped):
    names = {"edges": ("edge_index", "cell_offsets", "n_edges")}.get(mapped, (mapped,))
    single = replace(replicas[0], cell=1.001 * replicas[0].cell)
    if mapped == "batch":
        # Atoms of the third graph swap systems: unphysical, but both sides must agree.
        turned = jnp.where(single.batch < 2, (single.batch + 1) % 2, 2)
        some = {"batch": jnp.stack([single.batch, single.batch, turned])}
    elif mapped == "edges":
        # The same edges with decreasing counts.
        fewer = single.n_edges - jnp.arange(COUNT, dtype=jnp.int32) * 100
        some = {
            "edge_index": jnp.stack([single.edge_index] * COUNT),
            "cell_offsets": jnp.stack([single.cell_offsets] * COUNT),
            "n_edges": fewer.astype(jnp.int32),
        }
    elif mapped in ("positions", "cell"):
        start = getattr(single, mapped)
        some = {mapped: jnp.stack([start * (1 + 0.002 * k) for k in range(COUNT)])}
    else:
        some = {name: getattr(stacked, name) for name in names}

    def one(fields):
        return energy_and_gradients(model, replace(single, **fields))

    count, out = calls_of(model, jax.vmap(one), some)
    assert count == 1
    each = [one({k: v[r] for k, v in some.items()}) for r in range(COUNT)]
    assert_close(out, [np.stack(x) for x in zip(*each, strict=True)])


def test_graphs_are_merged_for_other_axes_and_a_mapped_model(model, stacked, looped):
    def one(m, positions, graph):
        return energy_and_gradients(m, replace(graph, positions=positions))

    cutoffs = jax.tree.map(lambda x: jnp.stack([x] * COUNT), model)
    last = jnp.moveaxis(stacked.positions, 0, 2)
    count, out = calls_of(model, jax.vmap(one, in_axes=(0, 2, 0)), cutoffs, last, stacked)
    assert count == 1
    assert_close(out, looped)


def test_graphs_without_edge_counts_or_batch_are_merged(model):
    single = graphs.atom_graph([reference.distorted(30)])
    bare = replace(single, batch=None, n_edges=None)
    moves = jnp.asarray([0.0, 0.01, -0.02])

    def one(move):
        return energy_and_gradients(model, replace(bare, positions=bare.positions * (1 + move)))

    count, out = calls_of(model, jax.vmap(one), moves)
    assert count == 1
    each = [one(move) for move in moves]
    assert_close(out, [np.stack(x) for x in zip(*each, strict=True)])


def test_graph_without_mapped_fields_takes_one_plain_call(model, replicas):
    def one(x):
        return x + energy(model, replicas[0]).sum()

    count, out = calls_of(model, jax.vmap(one), jnp.zeros(COUNT))
    assert count == 1
    assert len(set(np.asarray(out).tolist())) == 1


def test_no_graphs_have_no_energies(model, stacked):
    none = jax.tree.map(lambda x: x[:0], stacked)
    found = jax.vmap(lambda graph: of(model, graph))(none)
    assert [x.shape[0] for x in found] == [0, 0, 0]
    assert found[1].shape == none.positions.shape
