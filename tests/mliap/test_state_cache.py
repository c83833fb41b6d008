"""Cached outputs in a state: when they save an evaluation, and that they are never stale."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
from graphs import QUICK
from reference import one_thread  # noqa: F401
from states import Move, accept, counted, same_bits

from torchcall.mliap import (
    EMPTY,
    CachedOut,
    ComposedPatch,
    Edges,
    HyperGraph,
    IdPatch,
    Index,
    PositionAndCell,
    PotentialOut,
    SystemId,
    Table,
    TorchMliapInput,
    empty_cache,
    lens,
    torch_mliap_model_fn,
)

pytestmark = pytest.mark.usefixtures("x64")
BOTH = (True, True)


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        return states.model()


@pytest.fixture(scope="module")
def made(model):
    """The jitted potential; a state with an empty cache; the same state with a valid cache."""
    with jax.enable_x64(True):
        potential, start = states.cached(model)
        jitted = jax.jit(potential)
        return jitted, start, committed(jitted(start), start, *BOTH)


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


@jax.jit
def commit(patch, state, accepted):
    return patch(state, accepted)


def committed(result, state, *flags):
    return commit(result.patch, state, accept(*flags))


def evaluated(state):
    """The output without a cache."""
    listed = state.neighborlist(state.particles, state.systems, None)
    graph = HyperGraph(state.particles, state.systems, listed)
    inp = TorchMliapInput(state.torch_mliap_model, graph)
    return torch_mliap_model_fn(inp, compute_cell_gradients=True).data


def close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-10), a, b)


def plain(out):
    return PotentialOut(out.total_energies, out.gradients, out.hessians)


def move(seed=0, scale=0.03):
    return Move(jnp.asarray(np.random.default_rng(seed).normal(scale=scale, size=(16, 3))))


def test_an_unchanged_state_is_evaluated_once(made, model):
    potential, start, full = made
    assert not start.cache.known.any()
    count, first = counted(model, potential, start)
    assert count == 1
    after = committed(first, start, *BOTH)
    assert after.cache.known.all()
    assert same_bits(plain(after.cache), first.data)
    for patch in (None, IdPatch(), ComposedPatch((IdPatch(), Move(jnp.zeros((16, 3)))))):
        count, again = counted(model, potential, after, patch)
        assert count == 0
        assert same_bits(again.data, first.data)
        assert same_bits(committed(again, after, *BOTH), after)
    assert same_bits(after, full)


def test_a_loop_over_an_unchanged_state_makes_one_call(made, model):
    potential, start, _ = made

    def step(state, _):
        result = potential(state)
        return result.patch(state, accept(*BOTH)), result.data.total_energies.data

    run = quick(lambda s: jax.lax.scan(step, s, length=5))
    count, (_, energies) = counted(model, run, start)
    assert count == 1
    assert (energies == energies[0]).all()


def changed_states(state):
    """States that differ from the given one in a single input of the model."""
    atoms, boxes = state.particles.data, state.systems.data
    edges = state.neighborlist.edges
    last = int(edges.n_edges) - 1

    def atom(**fields):
        return dataclasses.replace(
            state, particles=state.particles.set_data(dataclasses.replace(atoms, **fields))
        )

    def box(**fields):
        return dataclasses.replace(
            state, systems=state.systems.set_data(dataclasses.replace(boxes, **fields))
        )

    def listed(**fields):
        return dataclasses.replace(
            state, neighborlist=states.Fixed(dataclasses.replace(edges, **fields))
        )

    x = atoms.positions
    charged = states.Charged(boxes.cell, boxes.pbc, jnp.asarray([0.0, 1.0]))
    system = atoms.system.indices
    swapped = edges.shifts.at[last].multiply(-1).at[last].add(1)
    return {
        "one bit of one position": atom(positions=x.at[7, 1].set(jnp.nextafter(x[7, 1], jnp.inf))),
        "the cell": box(cell=boxes.cell.at[1, 0, 2].add(1e-9)),
        "the periodicity": box(pbc=boxes.pbc.at[0, 2].set(False)),
        "an element": atom(atomic_numbers=atoms.atomic_numbers.at[3].set(32)),
        "an edge's image": listed(shifts=swapped),
        "one edge less": listed(n_edges=edges.n_edges - 1),
        "an atom's system": atom(
            system=dataclasses.replace(atoms.system, indices=system.at[0].set(1 - system[0]))
        ),
        "one atom less": atom(
            system=dataclasses.replace(atoms.system, indices=system.at[0].set(2))
        ),
        "a charge": dataclasses.replace(state, systems=state.systems.set_data(charged)),
    }


CHANGES = ["one bit of one position", "the cell", "the periodicity", "an element", "a charge"]
CHANGES += ["an edge's image", "one edge less", "an atom's system", "one atom less"]


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_with_a_changed_input_is_evaluated_again(made, model, change):
    potential, _, full = made
    changed = changed_states(full)[change]
    count, result = counted(model, potential, changed)
    assert count == 1
    close(result.data, evaluated(changed))
    after = committed(result, changed, *BOTH)
    count, again = counted(model, potential, after)
    assert (count, same_bits(again.data, result.data)) == (0, True)
    count, back = counted(model, potential, dataclasses.replace(full, cache=after.cache))
    assert count == 1
    close(back.data, plain(full.cache))


def test_the_order_of_edges_does_not_matter(made, model):
    potential, _, full = made
    edges = full.neighborlist.edges
    order = np.arange(edges.shifts.shape[0])
    order[: int(edges.n_edges)] = np.random.default_rng(0).permutation(int(edges.n_edges))
    other = dataclasses.replace(edges, indices=edges.indices[order], shifts=edges.shifts[order])
    count, _ = counted(
        model, potential, dataclasses.replace(full, neighborlist=states.Fixed(other))
    )
    assert count == 0


def test_a_change_of_one_system_keeps_the_others_output(made, model):
    potential, _, full = made
    proposal = move()
    result = potential(full, proposal)
    after = committed(result, full, True, False)
    assert after.cache.known.all()
    energies = after.cache.total_energies.data
    assert energies[0] == result.data.total_energies.data[0] != full.cache.total_energies.data[0]
    assert energies[1] == full.cache.total_energies.data[1]
    close(plain(after.cache), evaluated(after))
    count, again = counted(model, potential, after)
    assert count == 0
    assert same_bits(again.data, plain(after.cache))

    # One system changes: the other's output keeps its bits.
    ours = np.asarray(full.particles.data.system.indices == 1)[:, None]
    count, result = counted(model, potential, full, Move(jnp.where(ours, proposal.by, 0.0)))
    assert count == 1
    assert result.data.total_energies.data[0] == full.cache.total_energies.data[0]


def of_system(positions, cache, s, atoms):
    """Positions and cached values of one system."""
    by_system = (cache.total_energies.data, cache.gradients.cell, cache.inputs[4:], cache.known)
    by_atom = (positions, cache.gradients.positions, cache.inputs[:4])
    return jax.tree.map(lambda x: x[s], by_system), jax.tree.map(lambda x: x[atoms], by_atom)


def test_rejected_moves_leave_state_and_cache_unchanged(made, model):
    """A Metropolis walk of two systems, accepted independently."""
    potential, _, full = made

    def step(state, key):
        by, uniform = jax.random.split(key)
        proposal = Move(0.04 * jax.random.normal(by, (16, 3)))
        result = potential(state, proposal)
        change = result.data.total_energies.data - state.cache.total_energies.data
        yes = jnp.log(jax.random.uniform(uniform, (2,))) < -change / 0.3
        after = result.patch(state, state.cache.total_energies.set_data(yes))
        return after, (yes, after.particles.data.positions, after.cache)

    keys = jax.random.split(jax.random.key(0), 12)
    walk = quick(lambda s: jax.lax.scan(step, s, keys))
    count, (last, (yes, positions, caches)) = counted(model, walk, full)
    assert count == 12
    assert 3 < np.asarray(yes).sum() < 21
    owner = np.asarray(full.particles.data.system.indices)
    before = (full.particles.data.positions, full.cache)
    for k, accepted in enumerate(np.asarray(yes)):
        now = (positions[k], jax.tree.map(lambda leaf, k=k: leaf[k], caches))
        for s in np.flatnonzero(~accepted):
            assert same_bits(of_system(*before, s, owner == s), of_system(*now, s, owner == s))
        before = now
    close(plain(last.cache), evaluated(last))
    rejected = committed(potential(full, move(3)), full, False, False)
    assert same_bits(rejected, full)


def test_a_cached_output_is_differentiable_without_a_call(made, model):
    potential, _, full = made

    def total(positions, cell):
        return potential(full.at(positions, cell)).data.total_energies.data.sum()

    x, h = full.particles.data.positions, full.systems.data.cell
    count, (by_x, by_h) = counted(model, quick(jax.grad(total, (0, 1))), x, h)
    assert count == 0
    np.testing.assert_array_equal(by_x, full.cache.gradients.positions)
    np.testing.assert_array_equal(by_h, full.cache.gradients.cell)
    count, (by_x, _) = counted(model, quick(jax.grad(total, (0, 1))), x.at[0, 0].add(0.02), h)
    assert count == 1
    assert abs(by_x - full.cache.gradients.positions).max() > 1e-3


def test_vmapped_replicas_are_evaluated_if_one_changed(made, model):
    potential, _, full = made
    moved = move(1)(full, accept(True, True))
    mapped = quick(jax.vmap(potential))
    for second, calls in ((full, 0), (moved, 1)):
        pair = jax.tree.map(lambda *x: jnp.stack(x), full, second)
        count, out = counted(model, mapped, pair)
        assert count == calls
        assert same_bits(jax.tree.map(lambda leaf: leaf[0], out.data), plain(full.cache))
    close(jax.tree.map(lambda leaf: leaf[1], out.data), evaluated(moved))
    after = quick(jax.vmap(lambda p, s: p(s, accept(*BOTH))))(out.patch, pair)
    assert counted(model, mapped, after)[0] == 0


def test_patch_idx_view_selects_the_rows_that_are_written(model):
    def rows(s):
        system = s.particles.data.system
        return s.systems.index, PositionAndCell(system, EMPTY), EMPTY

    potential, start = states.cached(model, patch_idx_view=lambda s: PotentialOut(*rows(s)))
    result = quick(potential)(start)
    after = committed(result, start, True, False)
    assert after.cache.total_energies.data[0] == result.data.total_energies.data[0]
    assert np.isnan(after.cache.total_energies.data[1])
    assert np.isnan(after.cache.gradients.cell).all()
    written = np.asarray(start.particles.data.system.indices == 0)
    np.testing.assert_array_equal(~np.isnan(after.cache.gradients.positions).any(1), written)
    assert not after.cache.known.any()
    assert counted(model, quick(potential), after)[0] == 1


def test_rows_written_for_a_rejected_system_invalidate_it(made, model):
    """A `patch_idx_view` may assign rows to another system."""
    potential, _, full = made

    def rows(s):
        first = dataclasses.replace(s.systems.index, indices=jnp.zeros(2, jnp.int32))
        return first, PositionAndCell(s.particles.data.system, s.systems.index), EMPTY

    crossed, _ = states.cached(model, patch_idx_view=lambda s: PotentialOut(*rows(s)))
    result = quick(crossed)(full, move())
    after = committed(result, full, True, False)
    np.testing.assert_array_equal(after.cache.known, [True, False])
    count, out = counted(model, potential, after)
    assert count == 1
    close(out.data, evaluated(after))


def test_an_atom_that_changes_system_is_cached_only_if_both_systems_agree(made):
    potential, _, full = made
    atoms = full.particles.data
    other = dataclasses.replace(
        atoms.system, indices=atoms.system.indices.at[0].set(1 - atoms.system.indices[0])
    )
    changed = lens(lambda s: s.particles.data.system).set(full, other)
    result = potential(changed)
    for flags in (BOTH, (True, False), (False, True), (False, False)):
        after = committed(result, changed, *flags)
        assert after.cache.known.all() == (flags[0] == flags[1])
        for state in (changed, full):
            found = potential(dataclasses.replace(state, cache=after.cache))
            close(found.data, evaluated(state))


def test_an_output_can_be_stored_in_an_empty_cache_or_a_plain_output(made, model):
    potential, start, full = made
    uncached = dataclasses.replace(start, cache=EMPTY)
    after = committed(potential(uncached), uncached, True, False)
    assert isinstance(after.cache, CachedOut)
    np.testing.assert_array_equal(after.cache.known, [True, False])
    zeros = jax.tree.map(jnp.zeros_like, plain(full.cache))
    kups = dataclasses.replace(start, cache=zeros)
    for _ in range(2):
        count, result = counted(model, potential, kups)
        assert count == 1
        kups = committed(result, kups, True, False)
        assert type(kups.cache) is PotentialOut
        np.testing.assert_array_equal(
            kups.cache.total_energies.data, [result.data.total_energies.data[0], 0.0]
        )


def test_an_output_with_overflowed_edges_is_nan_and_never_cached(made, model):
    potential, start, full = made

    def overflown(state):
        flagged = dataclasses.replace(state.neighborlist.edges, did_overflow=jnp.asarray(True))
        return dataclasses.replace(state, neighborlist=states.Fixed(flagged))

    for state in (start, full):
        result = potential(overflown(state))
        assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(result.data))
        after = committed(result, overflown(state), *BOTH)
        assert not after.cache.known.any()
    count, out = counted(model, potential, dataclasses.replace(full, cache=after.cache))
    assert count == 1
    close(out.data, evaluated(full))


@pytest.mark.parametrize("n_systems", [0, 2])
def test_states_without_atoms_have_energies_of_zero(model, n_systems):
    none = jnp.zeros(0, jnp.int32)
    system = Index.integer(none, n=n_systems, label=SystemId)
    boxes = states.Boxes(jnp.tile(jnp.eye(3), (n_systems, 1, 1)), jnp.ones((n_systems, 3), bool))
    keys = tuple(map(SystemId, range(n_systems)))
    edges = Edges(jnp.zeros((0, 2), jnp.int32), jnp.zeros((0, 1, 3)))
    potential, _ = states.cached(model)
    state = states.State(
        Table((), states.Atoms(jnp.zeros((0, 3)), none, system)),
        Table(keys, boxes),
        states.Fixed(edges),
        model,
    )
    state = dataclasses.replace(state, cache=empty_cache(potential, state))
    result = quick(potential)(state)
    assert same_bits(result.data.total_energies.data, jnp.zeros(n_systems))
    assert result.patch(state, Table(keys, jnp.ones(n_systems, bool))).cache.known.all()


def test_a_cache_of_another_structure_is_an_error(made, model):
    potential, start, full = made
    other, _ = states.cached(dataclasses.replace(model, compute_cell_gradients=False))
    cases = {
        r"expected a PotentialOut, got dict": {},
        r"gradients: expected .*compute_cell_gradients may differ": empty_cache(
            other,
            dataclasses.replace(
                start, torch_mliap_model=dataclasses.replace(model, compute_cell_gradients=False)
            ),
        ),
        r"expected an output of this model, got another's": states.cached(states.model())[1].cache,
        r"expected float64 \(16, 3\), got float64 \(15, 3\); make a new one": lens(
            lambda c: c.gradients.positions
        ).set(full.cache, jnp.zeros((15, 3))),
    }
    for text, cache in cases.items():
        with pytest.raises((ValueError, TypeError), match=f"torchcall: out_cache_lens: {text}"):
            potential(dataclasses.replace(start, cache=cache))
