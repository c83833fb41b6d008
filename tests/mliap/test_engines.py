"""The same potential gives the same results in TorchScript, eager torch and AOTInductor."""

import threading
from dataclasses import replace

import engines
import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from engines import ENGINES, package, potential  # noqa: F401
from graphs import QUICK
from reference import one_thread  # noqa: F401

from torchcall.mliap import energy, energy_and_gradients

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def members():
    return [reference.systems()[kind] for kind in ("triclinic", "slab", "molecule")]


@pytest.fixture(params=ENGINES)
def model(request, package):  # noqa: F811
    return potential(request.param, package)


@pytest.fixture
def graph(members):
    return graphs.atom_graph(members, slots=4)


def test_energies_and_gradients_equal_those_of_the_jax_twin(model, members):
    mixed, places = graphs.shuffled(graphs.atom_graph(members), 4, padding=3)
    before = model.wrapper.stats()["calls"]
    out = jax.block_until_ready(jax.jit(energy_and_gradients)(model, mixed))
    assert model.wrapper.stats()["calls"] == before + 1
    module, first = reference.potentials()["Lennard-Jones"], 0
    for k, member in enumerate(members):
        twin = jax.value_and_grad(reference.twin("Lennard-Jones", module, member), (0, 1))
        value, (g, d) = jax.jit(twin, compiler_options=QUICK)(member.positions, member.cell)
        rows = places[first : first + len(g)]
        first += len(g)
        np.testing.assert_allclose(out.energy[k], value, rtol=1e-12)
        np.testing.assert_allclose(out.position_gradients[rows], g, atol=1e-12 * abs(g).max())
        np.testing.assert_allclose(out.cell_gradients[k], d, atol=1e-12 * abs(d).max())


@pytest.mark.parametrize("slots", [(0, 0, 0), (5, 300, 2)], ids=["exact", "padded"])
@pytest.mark.parametrize("narrow", ["auto", False])
def test_padding_and_narrowing_change_nothing(model, members, narrow, slots):
    atoms, edges, systems = slots
    plain = graphs.atom_graph(members)
    n, b = len(plain.positions), len(plain.cell)
    expected = energy_and_gradients(model, plain)
    capacity = (n + 1 + atoms, plain.edge_index.shape[1] + edges, b + 1 + systems)
    model = replace(model, narrow=narrow)
    if model.wrapper.stats()["engine"] != "AOTInductor":
        model = replace(model, capacity=capacity if narrow is False else None)
    out = energy_and_gradients(model, graphs.atom_graph(members, slots=edges))
    for got, want in zip(out, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def test_edge_counts_may_change_inside_a_program(model, graph):
    counts = jnp.asarray([0, 1, 2, int(graph.n_edges)], jnp.int32)

    @jax.jit
    def program(graph):
        return jax.lax.map(lambda n: energy(model, replace(graph, n_edges=n)), counts)

    out = program(graph)
    for k, count in enumerate(counts):
        np.testing.assert_allclose(
            out[k], energy(model, replace(graph, n_edges=count)), rtol=1e-12, atol=1e-14
        )
    assert not np.asarray(out[0]).any()


def test_graph_of_one_atom_without_edges_works(model):
    one = reference.distorted(3)
    single = replace(one, positions=one.positions[:1], numbers=one.numbers[:1], cell=9 * np.eye(3))
    lonely = graphs.atom_graph([single])
    assert lonely.edge_index.shape[1] == 0
    out = energy_and_gradients(model, lonely)
    assert out.energy.shape == (1,)
    assert not np.asarray(out.energy).any()
    assert not np.asarray(out.position_gradients).any()
    assert not np.asarray(out.cell_gradients).any()


def test_gradients_under_vmap_take_one_merged_call(model, graph):
    moves = np.random.default_rng(0).normal(scale=0.02, size=(3, *graph.positions.shape))
    replicas = graph.positions + moves

    def gradient(positions):
        return jax.grad(lambda x: energy(model, replace(graph, positions=x)).sum())(positions)

    before = model.wrapper.stats()["calls"]
    merged = jax.block_until_ready(jax.jit(jax.vmap(gradient))(replicas))
    assert model.wrapper.stats()["calls"] == before + 1
    looped = jnp.stack([gradient(positions) for positions in replicas])
    np.testing.assert_allclose(merged, looped, rtol=1e-12, atol=1e-12)


def test_concurrent_threads_get_the_same_results_as_one_thread(model, graph):
    program = jax.jit(lambda x: energy_and_gradients(model, replace(graph, positions=x)))
    inputs = [graph.positions + 0.01 * i for i in range(4)]
    expected = [program(x) for x in inputs]
    wrong: list[int] = []

    def work(i):
        with jax.enable_x64(True):  # the setting is per thread
            for _ in range(20):
                out = program(inputs[i])
                for got, want in zip(out, expected[i], strict=True):
                    if not np.array_equal(got, want):
                        wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive()
    assert not wrong


def test_nan_positions_give_nan_energy_for_their_system_only(model, graph):
    bad = graph.positions.at[2, 0].set(jnp.nan)
    out = energy(model, replace(graph, positions=bad))
    assert np.isnan(out[0])
    np.testing.assert_allclose(out[1:], energy(model, graph)[1:], rtol=1e-12)


def test_single_precision_programs_call_the_double_precision_model(model, members):
    single = graphs.atom_graph(members, dtype=np.float32)
    out = energy_and_gradients(model, single)
    expected = energy_and_gradients(model, graphs.atom_graph(members))
    assert {x.dtype for x in out} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(out.energy, expected.energy, rtol=1e-4)


def test_stats_name_the_engine(package):  # noqa: F811
    for engine in ENGINES:
        model = potential(engine, package)
        assert model.wrapper.stats()["engine"] == engine
        assert engine in repr(model.wrapper)
    assert engines.ENGINES == ENGINES
