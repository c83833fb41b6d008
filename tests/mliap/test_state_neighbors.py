"""A `NeighborList` as the neighbour list of a state."""

import dataclasses

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
from graphs import QUICK
from reference import one_thread  # noqa: F401
from states import counted

from torchcall.mliap import (
    SystemId,
    Table,
    energy_and_gradients,
    make_torch_mliap_from_state,
    make_torch_mliap_potential,
    neighbor_list,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        return states.model(compute_cell_gradients=False)


@pytest.fixture(scope="module")
def potential():
    return make_torch_mliap_from_state(lambda s: s)


@pytest.fixture(scope="module")
def jitted(potential):
    return jax.jit(lambda state: potential(state).data, compiler_options=QUICK)


@pytest.fixture(scope="module")
def state(model):
    """Shuffled atoms, and a list allocated for the atoms sorted by system."""
    with jax.enable_x64(True):
        made = states.state(model)
        atoms, boxes = made.particles.data, made.systems.data
        system = np.asarray(atoms.system.indices)
        order = np.argsort(system, stable=True)
        listed = neighbor_list(graphs.CUTOFF, skin=0.3).allocate(
            atoms.positions[order], boxes.cell, boxes.pbc, system[order]
        )
        return dataclasses.replace(made, neighborlist=listed)


listing = jax.jit(lambda neighbors, *args: neighbors(*args), compiler_options=QUICK)


def expected(model, state):
    """Energies and gradients from ASE's pairs at the state's positions."""
    atoms, order = (
        state.particles.data,
        np.argsort(state.particles.data.system.indices, stable=True),
    )
    members = [
        member.moved(np.asarray(atoms.positions)[part], member.cell)
        for member, part in zip(states.members(), np.split(order, 2), strict=True)
    ]
    members = [
        dataclasses.replace(member, numbers=np.asarray(atoms.atomic_numbers)[part])
        for member, part in zip(members, np.split(order, 2), strict=True)
    ]
    out = energy_and_gradients(model, graphs.atom_graph(members))
    return out.energy, out.position_gradients[np.argsort(order)]


def test_the_list_is_updated_for_atoms_in_any_order(model, state, jitted):
    """Without motion, with motion within the skin, and beyond it."""
    generator = np.random.default_rng(0)
    for scale in (0.0, 0.02, 0.2):
        noise = jnp.asarray(generator.normal(scale=scale, size=(16, 3)))
        moved = state.at(state.particles.data.positions + noise)
        count, out = counted(model, jitted, moved)
        assert count == 1
        energies, gradients = expected(model, moved)
        np.testing.assert_allclose(out.total_energies.data, energies, rtol=1e-12)
        np.testing.assert_allclose(out.gradients, gradients, rtol=0, atol=1e-9)


def test_vmapped_states_share_a_list_and_one_call(model, state, jitted):
    x = state.particles.data.positions
    noise = jnp.asarray(np.random.default_rng(1).normal(scale=0.1, size=x.shape))
    both = jnp.stack([x, x + noise])
    mapped = jax.jit(jax.vmap(lambda x: jitted.__wrapped__(state.at(x))), compiler_options=QUICK)
    count, out = counted(model, mapped, both)
    assert count == 1
    for k, positions in enumerate(both):
        alone = jitted(state.at(positions))
        for found, wanted in zip(jax.tree.leaves(out), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(found[k], wanted, rtol=0, atol=1e-11)


def test_a_list_for_the_same_positions_is_not_updated(state):
    atoms, listed = state.particles.data, state.neighborlist
    order = np.argsort(atoms.system.indices, stable=True)
    np.testing.assert_array_equal(listed.positions, atoms.positions[order])
    own = Table.arange(jnp.full(2, graphs.CUTOFF), label=SystemId)
    edges = listing(listed, state.particles, state.systems, own)
    n = int(listed.n_edges)
    assert (int(edges.n_edges), bool(edges.did_overflow)) == (n, False)
    np.testing.assert_array_equal(edges.indices.indices[:n], order[listed.edge_index[:, :n]].T)
    np.testing.assert_array_equal(edges.shifts[:n, 0], listed.cell_offsets[:n])


def test_overflow_gives_nan(state, potential, jitted):
    squeezed = state.at(0.55 * state.particles.data.positions, 0.55 * state.systems.data.cell)
    out = jitted(squeezed)
    assert np.isnan(out.total_energies.data).all()
    assert np.isnan(out.gradients).all()

    def total(x):
        return potential(squeezed.at(x)).data.total_energies.data.sum()

    forces = jax.jit(jax.grad(total), compiler_options=QUICK)
    assert np.isnan(forces(squeezed.particles.data.positions)).all()


def test_pairs_beyond_a_systems_cutoff_are_excluded(state):
    cutoffs = Table.arange(jnp.asarray([graphs.CUTOFF, 3.0]), label=SystemId)
    own = Table.arange(jnp.full(2, graphs.CUTOFF), label=SystemId)
    full = listing(state.neighborlist, state.particles, state.systems, own)
    short = listing(state.neighborlist, state.particles, state.systems, cutoffs)
    atoms, cells = state.particles.data, state.systems.data.cell

    def lengths(edges):
        i, j = np.asarray(edges.indices.indices[: edges.n_edges]).T
        s = np.asarray(atoms.system.indices)[i]
        shift = np.einsum("ek,ekl->el", edges.shifts[: edges.n_edges, 0], cells[s])
        x = np.asarray(atoms.positions)
        return s, np.linalg.norm(x[j] - x[i] + shift, axis=1)

    (s, r), (t, q) = lengths(full), lengths(short)
    within = (s == 0) | (r < 3.0)
    assert within.sum() < len(r)
    np.testing.assert_array_equal(np.sort(q), np.sort(r[within]))
    np.testing.assert_array_equal(np.sort(t), np.sort(s[within]))
    # The model's cutoff is larger: pairs would be missing.
    with pytest.raises(ValueError, match=r"torchcall: cutoffs: expected the model's"):
        make_with(cutoffs, state)(state)
    out = jax.jit(lambda s, c: make_with(c, s)(s).data, compiler_options=QUICK)(state, cutoffs)
    assert np.isnan(out.total_energies.data).all()


def make_with(cutoffs, state):
    return make_torch_mliap_potential(
        lambda s: s.particles,
        lambda s: s.systems,
        lambda s: s.neighborlist,
        state.torch_mliap_model,
        lambda _: cutoffs,
    )


def test_a_list_for_other_systems_or_a_shorter_cutoff_is_an_error(state, potential, jitted):
    atoms = state.particles.data
    system = dataclasses.replace(
        atoms.system, indices=atoms.system.indices.at[0].set(1 - atoms.system.indices[0])
    )
    other = dataclasses.replace(
        state, particles=state.particles.set_data(dataclasses.replace(atoms, system=system))
    )
    with pytest.raises(ValueError, match="torchcall: neighborlist: expected the allocated number"):
        potential(other)
    assert np.isnan(jitted(other).total_energies.data).all()
    slab = dataclasses.replace(state.systems.data, pbc=state.systems.data.pbc.at[0, 0].set(False))
    with pytest.raises(ValueError, match=r"torchcall: neighborlist: .*periodicity, got"):
        potential(dataclasses.replace(state, systems=state.systems.set_data(slab)))
    longer = Table.arange(jnp.asarray([graphs.CUTOFF + 0.1]), label=SystemId)
    with pytest.raises(ValueError, match=r"torchcall: neighborlist: expected cutoffs of at most"):
        state.neighborlist(state.particles, state.systems, longer)
    fewer = dataclasses.replace(
        state, particles=Table.arange(jax.tree.map(lambda x: x[1:], atoms), label=SystemId)
    )
    with pytest.raises(ValueError, match=r"torchcall: neighborlist: .* 16 and 2, got 15 and 2"):
        potential(fewer)


def test_float32_lists_work_with_x64_enabled(model):
    state = states.state(model, dtype=np.float32)
    graph = graphs.atom_graph(states.members(), dtype=np.float32)
    geometry = (graph.positions, graph.cell, graph.pbc, graph.batch)
    listed = neighbor_list(graphs.CUTOFF).allocate(*geometry)
    edges = listing(listed, state.particles, state.systems, model.cutoff)
    assert int(edges.n_edges) == int(state.neighborlist.edges.n_edges)
