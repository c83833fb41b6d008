"""A list that was not updated for the positions or cells gives NaN; others give their graph."""

import itertools
from dataclasses import replace
from functools import partial

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from graphs import QUICK
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall.mliap import (
    AtomGraph,
    check_model,
    energy,
    energy_and_gradients,
    neighbor_list,
    pad_graph,
)
from torchcall.mliap._graph import ListedGraph, listed
from torchcall.mliap._moved import moved_too_far

pytestmark = pytest.mark.usefixtures("x64")
KINDS = ["triclinic", "slab"]
SKIN = 0.4
FAR, NEAR = 1.05 * SKIN / 2, 0.95 * SKIN / 2


@pytest.fixture(scope="module")
def model():
    return graphs.potential("Lennard-Jones")


@pytest.fixture(scope="module")
def geometry():
    """Positions, cells, numbers and list of a triclinic crystal and a slab."""
    with jax.enable_x64(True):
        members = [reference.systems()[kind] for kind in KINDS]
        graph = graphs.atom_graph(members)
        search = neighbor_list(CUTOFF, skin=SKIN)
        nbrs = search.allocate(graph.positions, graph.cell, graph.pbc, graph.batch)
        return graph.positions, graph.cell, graph.atomic_numbers, nbrs


@partial(jax.jit, static_argnames="check_moved", compiler_options=QUICK)
def results(model, positions, cell, numbers, nbrs, check_moved=True):
    """Energies, their gradients by positions and cell, and the same without derivatives."""

    def graph_at(positions, cell):
        return AtomGraph.from_neighbors(nbrs, positions, cell, numbers, check_moved=check_moved)

    def total(positions, cell):
        energies = energy(model, graph_at(positions, cell))
        return energies.sum(), energies

    run = jax.value_and_grad(total, (0, 1), has_aux=True)
    (_, energies), gradients = run(positions, cell)
    return energies, *gradients, *energy_and_gradients(model, graph_at(positions, cell))


def shift(positions, length):
    """One atom displaced by this length."""
    direction = np.array([0.48, -0.6, 0.64])
    return positions.at[3].add(length * direction)


def test_a_list_of_other_positions_gives_nan_where_it_gave_a_wrong_energy():
    """Two argon atoms 10 Å apart, moved to 3.5 Å: the list has no pair, so the energy was 0."""
    model = graphs.potential("Lennard-Jones")
    cell, pbc, batch = 30 * jnp.eye(3)[None], jnp.ones((1, 3), bool), jnp.zeros(2, jnp.int32)
    apart, close = (jnp.array([[0.0, 0, 0], [r, 0, 0]]) for r in (10.0, 3.5))
    numbers = jnp.full(2, 18, jnp.int32)
    nbrs = neighbor_list(CUTOFF, skin=0.5).allocate(apart, cell, pbc, batch)
    blind = results(model, close, cell, numbers, nbrs, check_moved=False)
    assert not any(np.asarray(leaf).any() for leaf in blind)
    assert all(np.isnan(leaf).all() for leaf in results(model, close, cell, numbers, nbrs))
    fresh = results(model, close, cell, numbers, nbrs.grow().rebuild(close, cell))
    assert fresh[0][0] < -1e-3
    assert abs(fresh[1]).max() > 1e-4


@pytest.mark.parametrize("change", ["shorter", "sheared"])
def test_a_cell_that_changes_without_its_atoms_gives_nan(change):
    """The strain of 1/30 is small, but one atom's image moves by 1 Å, to within the cutoff."""
    model = graphs.potential("Lennard-Jones")
    old, pbc, batch = 30 * jnp.eye(3)[None], jnp.ones((1, 3), bool), jnp.zeros(2, jnp.int32)
    if change == "shorter":
        positions, new = jnp.array([[0.5, 0, 0], [26.0, 0, 0]]), old.at[0, 0, 0].set(29)
    else:
        positions, new = jnp.array([[0.0, 0, 0], [26.2, 2, 0]]), old.at[0, 0, 1].set(1)
    numbers = jnp.full(2, 18, jnp.int32)
    nbrs = neighbor_list(CUTOFF, skin=0.5).allocate(positions, old, pbc, batch)
    assert int(nbrs.n_edges) == 0
    assert all(np.isnan(leaf).all() for leaf in results(model, positions, new, numbers, nbrs))
    fresh = results(model, positions, new, numbers, nbrs.grow().rebuild(positions, new))
    system = reference.System(*(np.asarray(a) for a in (positions, numbers, new[0], pbc[0])))
    np.testing.assert_allclose(fresh[0], reference.lennard_jones(system)(positions, new[0]))
    assert fresh[0][0] < -1e-3


@pytest.mark.parametrize("moved", ["an atom", "a cell", "not a number"])
def test_moves_beyond_the_allowance_give_nan_and_lesser_ones_do_not(model, geometry, moved):
    positions, cell, numbers, nbrs = geometry

    def at(length):
        if moved == "an atom":
            return shift(positions, length), cell
        if moved == "a cell":  # of the slab, with its atoms
            factor = 1 + length / CUTOFF / np.sqrt(2) * np.array([1, 1, 0])
            return positions.at[8:].multiply(factor), cell.at[1].multiply(factor)
        return positions.at[3, 1].set(np.nan if length == FAR else positions[3, 1]), cell

    far, near = (results(model, *at(length), numbers, nbrs) for length in (FAR, NEAR))
    assert all(np.isnan(leaf).all() for leaf in far)
    assert all(np.isfinite(leaf).all() for leaf in near)
    updated = nbrs.update(*at(FAR))
    if moved != "not a number":
        assert all(np.isfinite(leaf).all() for leaf in results(model, *at(FAR), numbers, updated))
        blind = results(model, *at(FAR), numbers, nbrs, check_moved=False)
        assert all(np.isfinite(leaf).all() for leaf in blind)


def test_a_list_without_a_skin_allows_finite_differences(model, geometry):
    positions, cell, numbers, nbrs = geometry
    bare = neighbor_list(CUTOFF).allocate(positions, cell, nbrs.pbc, nbrs.batch)
    near, far = (
        results(model, shift(positions, length), cell, numbers, bare) for length in (0.049, 0.051)
    )
    assert all(np.isfinite(leaf).all() for leaf in near)
    assert all(np.isnan(leaf).all() for leaf in far)


def test_positions_replaced_in_a_graph_are_compared_too(model, geometry):
    positions, cell, numbers, nbrs = geometry
    graph = AtomGraph.from_neighbors(nbrs, positions, cell, numbers)
    far = replace(graph, positions=shift(positions, FAR))
    for compiled in (False, True):
        run = jax.jit(energy, compiler_options=QUICK) if compiled else energy
        assert np.isnan(run(model, far)).all()
        assert np.isfinite(run(model, graph)).all()
    assert not check_model(model, far).ok
    with pytest.raises(ValueError, match=r"^torchcall: graph.list_cutoff: expected"):
        energy(model, replace(far, list_cutoff=None))


def test_of_mapped_geometries_only_those_that_moved_give_nan(model, geometry):
    positions, cell, numbers, nbrs = geometry
    many = jnp.stack([positions, shift(positions, FAR), shift(positions, NEAR)])

    def one(x):
        def total(x):
            return energy(model, AtomGraph.from_neighbors(nbrs, x, cell, numbers)).sum()

        return jax.value_and_grad(total)(x)

    before = model.wrapper.stats()["calls"]
    values, gradients = jax.block_until_ready(jax.jit(jax.vmap(one))(many))
    assert model.wrapper.stats()["calls"] == before + 1
    assert np.isnan(values).tolist() == [False, True, False]
    assert np.isnan(gradients).all((1, 2)).tolist() == [False, True, False]
    expected = results(model, many[2], cell, numbers, nbrs)
    np.testing.assert_allclose(values[2], expected[0].sum(), rtol=1e-12)
    np.testing.assert_allclose(gradients[2], expected[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch", [None, [0, 0, 0, 1, -1], [1, 1, 1, 0, 2]], ids=str)
@pytest.mark.parametrize("pbc", [*itertools.product([False, True], repeat=3)], ids=str)
def test_moves_are_those_beside_the_deformation_of_the_periodic_axes(pbc, batch):
    generator = np.random.default_rng(sum(2**k for k in range(3) if pbc[k]))
    old = 4 * np.eye(3) + generator.uniform(-1.5, 1.5, (3, 3))
    new = old + generator.uniform(-0.1, 0.1, (3, 3))
    rows = np.array(pbc)
    old[~rows] = generator.choice([0.0, 7.0])  # ignored
    strain = np.linalg.pinv(old[rows]) @ (new - old)[rows]
    norm = np.linalg.norm(strain) or 1.0
    x = generator.uniform(-9, 9, (3, 3))
    direction = generator.normal(size=3)
    cells, moves = [[new], [old]], np.zeros((3, 3))
    if batch is not None:
        # The fourth atom stays; it is padding, or in a system that stays. The fifth is padding.
        x = np.concatenate([x, generator.uniform(-9, 9, (2, 3))])
        moves = np.concatenate([moves, [[0, 0, 0], [9, 9, 9]]])
    moves[:3] += x[:3] @ strain
    if batch and batch[0] == 1:
        cells = [[np.eye(3), h] for (h,) in cells]
    for shift, change in itertools.product((0.1, 0.299, 0.301), repeat=2):
        moves_now = moves.copy()
        moves_now[1] += shift * direction / np.linalg.norm(direction)
        found = moved_too_far(
            jnp.asarray(x + moves_now),
            jnp.asarray(cells[0]),
            jnp.asarray(x),
            jnp.asarray(cells[1]),
            jnp.asarray([pbc] * len(cells[0])),
            None if batch is None else jnp.asarray(batch),
            cutoff=change / norm,  # strain times cutoff, in Å
            skin=0.6,
        )
        assert bool(found) == (shift > 0.3 or (rows.any() and change > 0.3))


# The list's own arrays are passed on without being sorted and masked.


def plain(graph):
    """The graph without the memory of its list."""
    return replace(graph, _listed=None)


def test_the_graph_of_a_list_is_padded_as_any_other(geometry):
    positions, cell, numbers, nbrs = geometry
    graph = AtomGraph.from_neighbors(nbrs, positions, cell, numbers, charge=jnp.ones(2))
    assert isinstance(listed(graph), ListedGraph)
    n, e = len(positions), nbrs.edge_index.shape[1]
    for sizes in ({}, {"n_atoms": n + 4, "n_edges": e + 5, "n_systems": 5}):
        found, expected = (pad_graph(g, cutoff=CUTOFF, **sizes) for g in (graph, plain(graph)))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("evaluate", [energy, energy_and_gradients])
def test_programs_of_a_lists_graph_do_not_sort_its_atoms(model, geometry, evaluate):
    positions, cell, numbers, nbrs = geometry

    def program(change):
        def run(positions):
            graph = AtomGraph.from_neighbors(nbrs, positions, cell, numbers)
            return evaluate(model, change(graph))

        return str(jax.make_jaxpr(run)(positions))

    assert " sort[" not in program(lambda graph: graph)
    assert " sort[" in program(plain)


@pytest.mark.parametrize("field", ["batch", "edge_index", "cell_offsets", "n_edges", "pbc"])
def test_a_replaced_field_is_not_taken_for_the_lists_own(geometry, field):
    positions, cell, numbers, nbrs = geometry
    graph = AtomGraph.from_neighbors(nbrs, positions, cell, numbers)
    assert type(listed(replace(graph, positions=positions + 0.01))) is ListedGraph
    # Equal values, but who knows that under jit?
    same = jnp.array(getattr(graph, field))
    assert type(listed(replace(graph, **{field: same}))) is AtomGraph
    assert type(listed(jax.tree.map(lambda x: x, graph))) is AtomGraph


def test_fewer_edges_and_padding_atoms_are_masked_after_replacement(model, geometry):
    positions, cell, numbers, nbrs = geometry
    graph = AtomGraph.from_neighbors(nbrs, positions, cell, numbers)
    changed = replace(graph, n_edges=graph.n_edges // 2, batch=jnp.where(graph.batch == 0, 0, 2))
    for change in (changed, replace(changed, n_edges=None)):
        found = energy_and_gradients(model, change)
        expected = energy_and_gradients(model, plain(change))
        jax.tree.map(np.testing.assert_array_equal, found, expected)
        assert found.energy[1] == 0
