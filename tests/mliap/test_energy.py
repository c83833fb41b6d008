"""`energy` against JAX twins, and its derivatives against the gradients that the model returns."""

from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from graphs import QUICK
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall.mliap import AtomGraph, TorchMliap, energy, energy_and_gradients, neighbor_list

pytestmark = pytest.mark.usefixtures("x64")
NAMES = ["Lennard-Jones", "Stillinger-Weber", "message passing"]


@pytest.fixture(scope="module")
def model():
    return graphs.potential("Stillinger-Weber")


@pytest.fixture(scope="module")
def members():
    return [reference.systems()[kind] for kind in ("triclinic", "slab", "molecule")]


@pytest.fixture
def graph(members):
    return graphs.atom_graph(members, slots=4)


def calls_of(model, function, *args):
    """How often one call of the compiled function calls the model, and the function's result."""
    compiled = jax.jit(function).lower(*args).compile(QUICK)
    before = model.wrapper.stats()["calls"]
    out = jax.block_until_ready(compiled(*args))
    return model.wrapper.stats()["calls"] - before, out


@pytest.mark.parametrize("name", NAMES)
def test_energies_and_their_derivatives_equal_those_of_the_jax_twin(members, name):
    module, model = reference.potentials()[name], graphs.potential(name)
    mixed, places = graphs.shuffled(graphs.atom_graph(members), 4, padding=3)

    def total(positions, cell):
        energies = energy(model, replace(mixed, positions=positions, cell=cell))
        return energies.sum(), energies

    differentiate = jax.value_and_grad(total, (0, 1), has_aux=True)
    count, result = calls_of(model, differentiate, mixed.positions, mixed.cell)
    assert count == 1
    (_, energies), (by_position, by_cell) = result
    first = 0
    for k, member in enumerate(members):
        twin = jax.value_and_grad(reference.twin(name, module, member), (0, 1))
        value, (g, d) = jax.jit(twin, compiler_options=QUICK)(member.positions, member.cell)
        rows = places[first : first + len(g)]
        first += len(g)
        scale = max(abs(g).max(), abs(d).max())
        np.testing.assert_allclose(energies[k], value, rtol=1e-12)
        np.testing.assert_allclose(by_position[rows], g, rtol=0, atol=1e-12 * scale)
        np.testing.assert_allclose(by_cell[k], d, rtol=0, atol=1e-12 * scale)
    assert not np.delete(np.asarray(by_position), places, axis=0).any()


def test_value_and_gradient_take_one_call(model, graph):
    def value_and_grad(positions):
        return jax.value_and_grad(lambda x: energy(model, replace(graph, positions=x)).sum())(
            positions
        )

    text = jax.jit(value_and_grad).lower(graph.positions).as_text()
    assert text.count("custom_call @torchcall") == 1
    assert calls_of(model, value_and_grad, graph.positions)[0] == 1


def test_jvp_contracts_gradients_with_directions_per_system(model, graph):
    generator = np.random.default_rng(0)
    dx = jnp.asarray(generator.normal(size=graph.positions.shape))
    dh = jnp.asarray(generator.normal(size=graph.cell.shape))

    def move(x, h):
        return energy(model, replace(graph, positions=x, cell=h))

    def push(x, h):
        return jax.jvp(move, (x, h), (dx, dh))

    count, (value, slope) = calls_of(model, push, graph.positions, graph.cell)
    assert count == 1
    out = energy_and_gradients(model, graph)
    np.testing.assert_array_equal(value, out.energy)
    by_atom = np.einsum("nk,nk->n", out.position_gradients, dx)
    expected = np.bincount(np.asarray(graph.batch), by_atom, len(graph.cell))
    expected += np.einsum("bkl,bkl->b", out.cell_gradients, dh)
    np.testing.assert_allclose(slope, expected, rtol=1e-12)


def test_cell_gradient_at_fixed_fractional_coordinates_gives_the_virial(model, members):
    """With `r = s @ h`, a change of `h` strains atoms and cell together: `dE/dh = h⁻ᵀ virial`."""
    system = members[0]
    graph = graphs.atom_graph([system])
    frac = jnp.asarray(np.linalg.solve(system.cell.T, system.positions.T).T)

    def at(cell):
        return energy(model, replace(graph, positions=frac @ cell[0], cell=cell))[0]

    count, found = calls_of(model, jax.grad(at), graph.cell)
    assert count == 1
    module = reference.potentials()["Stillinger-Weber"]
    expected = reference.cell_derivative(module, system, fixed="fractional")
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-8 * abs(expected).max())


def test_gradients_are_the_same_under_scan_cond_remat_and_eagerly(model, graph):
    def of(positions):
        return energy(model, replace(graph, positions=positions)).sum()

    expected = energy_and_gradients(model, graph).position_gradients
    weights = jnp.asarray([1.0, 0.5, -2.0])

    def scanned(positions):
        def body(total, w):
            return total + w * of(positions), None

        return jax.lax.scan(body, jnp.zeros(()), weights)[0]

    def chosen(positions):
        return jax.lax.cond(positions[0, 0] > 1e9, lambda x: 0.0 * x.sum(), of, positions)

    for function, factor in ((scanned, -0.5), (chosen, 1.0), (jax.checkpoint(of), 1.0)):
        found = jax.jit(jax.grad(function), compiler_options=QUICK)(graph.positions)
        np.testing.assert_allclose(found, factor * expected, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(jax.grad(of)(graph.positions), expected)
    np.testing.assert_array_equal(jax.linearize(of, graph.positions)[0], of(graph.positions))


def test_forces_inside_a_loop_take_one_call_per_step(model, graph):
    def step(x, _):
        value, g = jax.value_and_grad(lambda y: energy(model, replace(graph, positions=y)).sum())(x)
        return x - 1e-3 * g, value

    def relax(x):
        return jax.lax.scan(step, x, length=5)

    count, (_, values) = calls_of(model, relax, graph.positions)
    assert count == 5
    assert (np.diff(values) < 0).all()


def refusals(model, graph):
    def of(**fields):
        return energy(model, replace(graph, **fields)).sum()

    def forces(x):
        return energy_and_gradients(model, replace(graph, positions=x)).position_gradients.sum()

    b = jnp.zeros(len(graph.cell))
    return {
        "second derivatives": lambda: jax.hessian(lambda x: of(positions=x))(graph.positions),
        "derivatives of gradients": lambda: jax.grad(forces)(graph.positions),
        "charge": lambda: jax.grad(lambda q: of(charge=q))(b),
        "spin": lambda: jax.grad(lambda q: of(spin=q))(b),
    }


@pytest.mark.parametrize(
    "what, text",
    [
        ("second derivatives", "second derivatives: expected a module whose output"),
        ("derivatives of gradients", "second derivatives: expected a module whose output"),
        ("charge", "differentiation in graph.charge is not supported"),
        ("spin", "differentiation in graph.spin is not supported"),
    ],
)
def test_derivatives_that_models_do_not_return_are_refused(model, graph, what, text):
    with pytest.raises(NotImplementedError, match=f"torchcall: .*{text}|torchcall: {text}"):
        refusals(model, graph)[what]()


def test_model_without_cell_gradients_refuses_only_cell_derivatives(graph):
    module = reference.example("stillinger_weber").StillingerWeber(cell_gradients=False)
    plain = TorchMliap.from_module(graphs.script(module), CUTOFF)

    def of(positions, cell):
        return energy(plain, replace(graph, positions=positions, cell=cell)).sum()

    full = energy_and_gradients(graphs.potential("Stillinger-Weber"), graph)
    found = jax.grad(of)(graph.positions, graph.cell)
    np.testing.assert_allclose(found, full.position_gradients, rtol=0, atol=1e-13)
    assert energy_and_gradients(plain, graph).cell_gradients is None
    with pytest.raises(ValueError, match=r"torchcall: .*compute_cell_gradients=True"):
        jax.grad(of, 1)(graph.positions, graph.cell)


def test_position_gradients_work_with_charges(model, graph):
    charge = jnp.asarray([1.0, 2.0, 3.0])

    def of(positions, charge):
        return energy(model, replace(graph, positions=positions, charge=charge)).sum()

    jax.grad(of)(graph.positions, charge)


def test_derivatives_by_cell_offsets_and_cutoff_are_zero(model, graph):
    by_offset = jax.grad(lambda s: energy(model, replace(graph, cell_offsets=s)).sum())
    assert not np.asarray(by_offset(graph.cell_offsets)).any()
    by_model = jax.grad(lambda m: energy(m, graph).sum())(model)
    assert not np.asarray(by_model.cutoff.data).any()


def overflowed(graph):
    """Graphs from which edges may be missing, by name, as functions of `n_edges` and a flag."""
    slots = graph.edge_index.shape[1]
    return {
        "the list overflowed": replace(graph, did_overflow=jnp.asarray(True)),
        "more edges than slots": replace(graph, n_edges=jnp.int32(slots + 1)),
        "fewer than none": replace(graph, n_edges=jnp.int32(-1)),
    }


@pytest.mark.parametrize(
    "reason", ["the list overflowed", "more edges than slots", "fewer than none"]
)
def test_missing_edges_give_nan_energies_and_gradients(model, graph, reason):
    graph, places = graphs.shuffled(graph, 0, padding=2)
    wrong = overflowed(graph)[reason]

    def total(positions, cell, graph):
        return energy(model, replace(graph, positions=positions, cell=cell)).sum()

    differentiate = jax.jit(jax.value_and_grad(total, (0, 1)), compiler_options=QUICK)
    padding = np.delete(np.arange(len(graph.positions)), places)
    for given, isbad in ((graph, np.isfinite), (wrong, np.isnan)):
        value, (by_position, by_cell) = differentiate(graph.positions, graph.cell, given)
        assert isbad(value)
        assert isbad(by_position[places]).all()
        assert not np.asarray(by_position)[padding].any()
        assert isbad(by_cell).all()
    out = jax.jit(energy_and_gradients, compiler_options=QUICK)(model, wrong)
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(out))
    # Of mapped graphs, the others stay.
    both = replace(
        graph,
        n_edges=jnp.stack([graph.n_edges, wrong.n_edges]),
        did_overflow=jnp.asarray([False, wrong.did_overflow is not None]),
    )
    axes = replace(jax.tree.map(lambda _: None, graph), n_edges=0, did_overflow=0)
    mapped = jax.jit(jax.vmap(lambda g: energy(model, g), (axes,)), compiler_options=QUICK)(both)
    assert np.isfinite(mapped[0]).all()
    assert np.isnan(mapped[1]).all()


def test_a_known_number_of_edges_beyond_the_slots_is_an_error(model, graph):
    slots = graph.edge_index.shape[1]
    text = rf"torchcall: graph.n_edges: expected 0 to {slots}, the number of edge slots, got"
    for count in (slots + 1, -1):
        with pytest.raises(ValueError, match=text):
            energy(model, replace(graph, n_edges=jnp.int32(count)))


def test_a_graph_of_an_overflowed_list_gives_nan(model, members):
    member = members[0]
    geometry = member.positions, member.cell[None], member.pbc[None], np.zeros(8, np.int32)
    nbrs = neighbor_list(CUTOFF, capacity_multiplier=1.0).allocate(*geometry)
    close = member.positions * 0.9, member.cell[None] * 0.9
    nbrs = nbrs.update(*close)
    assert nbrs.n_edges > nbrs.edge_index.shape[1]
    graph = AtomGraph.from_neighbors(nbrs, *map(jnp.asarray, close), jnp.asarray(member.numbers))
    assert np.isnan(energy(model, graph)).all()
    assert np.isnan(energy_and_gradients(model, graph).position_gradients).all()
