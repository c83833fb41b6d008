"""Potentials of states, compared with `energy_and_gradients` of ASE's graphs."""

import dataclasses
from typing import Any, NamedTuple

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import states
from graphs import QUICK
from reference import one_thread  # noqa: F401
from states import AtomsTuple, BoxesTuple, Move, accept, counted

from torchcall.mliap import (
    EMPTY,
    Edges,
    HyperGraph,
    IdPatch,
    Index,
    IsTorchMliapParticles,
    IsTorchMliapState,
    ParticleId,
    PositionAndCell,
    PotentialOut,
    SystemId,
    Table,
    TorchMliapInput,
    WithPatch,
    energy_and_gradients,
    lens,
    make_torch_mliap_from_state,
    make_torch_mliap_potential,
    sum_potentials,
    torch_mliap_model_fn,
)

pytestmark = pytest.mark.usefixtures("x64")
WHOLE = lens(lambda s: s)


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        return states.model()


@pytest.fixture(scope="module")
def state(model):
    with jax.enable_x64(True):
        return states.state(model)


@pytest.fixture(scope="module")
def potential():
    return make_torch_mliap_from_state(WHOLE, compute_position_and_cell_gradients=True)


@pytest.fixture(scope="module")
def expected(model):
    """Energies and gradients in the order of the state's atoms."""
    with jax.enable_x64(True):
        out = energy_and_gradients(model, graphs.atom_graph(states.members()))
        return out._replace(position_gradients=out.position_gradients[states.order()])


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def close(out, expected):
    np.testing.assert_allclose(out.total_energies.data, expected.energy, rtol=1e-13)
    gradients = out.gradients
    if isinstance(gradients, PositionAndCell):
        np.testing.assert_allclose(gradients.cell, expected.cell_gradients, rtol=0, atol=1e-11)
        gradients = gradients.positions
    np.testing.assert_allclose(gradients, expected.position_gradients, rtol=0, atol=1e-11)


class Box(NamedTuple):
    cell: Any


class Vectors(NamedTuple):
    vectors: Any
    periodic: Any


def forms(state):
    """The same state with its parts in other types."""
    atoms, boxes = state.particles.data, state.systems.data
    plain = AtomsTuple(atoms.positions, atoms.atomic_numbers, atoms.system.indices)
    swapped = Index(("b", "a"), 1 - atoms.system.indices)
    named = dataclasses.replace(atoms, system=swapped)
    return {
        "tables of dataclasses": state,
        "named tuples without tables": dataclasses.replace(
            state, particles=plain, systems=BoxesTuple(boxes.cell, (True, True, True))
        ),
        "systems with names": dataclasses.replace(
            state,
            particles=state.particles.set_data(named),
            systems=Table(("a", "b"), boxes),
        ),
        "a cell with vectors and periodicity": dataclasses.replace(
            state, systems=state.systems.set_data(Box(Vectors(boxes.cell, (True, True, True))))
        ),
    }


@pytest.mark.parametrize(
    "form",
    [
        "tables of dataclasses",
        "named tuples without tables",
        "systems with names",
        "a cell with vectors and periodicity",
    ],
)
def test_parts_of_a_state_may_have_different_types(state, potential, expected, form):
    given = forms(state)[form]
    result = potential(given)
    assert isinstance(result, WithPatch)
    assert isinstance(result.patch, IdPatch)
    assert result.data.hessians is EMPTY
    close(result.data, expected)
    assert result.data.total_energies.keys == getattr(given.systems, "keys", (0, 1))


def test_states_and_particles_satisfy_the_protocols(state):
    assert isinstance(state, IsTorchMliapState)
    assert isinstance(state.particles.data, IsTorchMliapParticles)


def test_edges_may_be_in_any_order_and_padded_anywhere(state, model, expected):
    listed = state.neighborlist(state.particles, state.systems, model.cutoff)
    e = int(listed.n_edges)
    order = np.random.default_rng(1).permutation(e + 7)
    indices = np.full((e + 7, 2), 99, np.int32)
    shifts = np.zeros((e + 7, 1, 3))
    indices[order[:e]] = listed.indices.indices[:e]
    shifts[order[:e]] = listed.shifts[:e]
    for pairs in (jnp.asarray(indices), Index(state.particles.keys, jnp.asarray(indices))):
        graph = HyperGraph(state.particles, state.systems, Edges(pairs, jnp.asarray(shifts)))
        result = torch_mliap_model_fn(TorchMliapInput(model, graph), compute_cell_gradients=True)
        close(result.data, expected)
    plain = torch_mliap_model_fn(TorchMliapInput(model, graph))
    assert plain.data.gradients.shape == (16, 3)


def test_padded_particles_have_zero_gradient_and_no_influence(state, model, expected):
    listed = state.neighborlist(state.particles, state.systems, model.cutoff)
    atoms = state.particles.data

    def padded(values, fill):
        return jnp.concatenate([values[:5], jnp.full((2, *values.shape[1:]), fill), values[5:]])

    system = Index(atoms.system.keys, padded(atoms.system.indices, 2))
    numbers = padded(atoms.atomic_numbers, 99).astype(jnp.int32)
    more = states.Atoms(padded(atoms.positions, 0.3), numbers, system)
    pairs = listed.indices.indices
    edges = Edges(jnp.where(pairs < 5, pairs, pairs + 2), listed.shifts, listed.n_edges)
    graph = HyperGraph(Table.arange(more, label=ParticleId), state.systems, edges)
    out = torch_mliap_model_fn(TorchMliapInput(model, graph), compute_cell_gradients=True).data
    positions = np.asarray(out.gradients.positions)
    assert not positions[5:7].any()
    real = out.gradients._replace(positions=np.delete(positions, [5, 6], 0))
    close(dataclasses.replace(out, gradients=real), expected)


def test_jit_scan_and_vmap_make_one_call_per_evaluation(state, potential, expected, model):
    count, result = counted(model, quick(potential), state)
    close(result.data, expected)
    assert count == 1

    def step(carry, _):
        out = potential(carry).data
        moved = carry.particles.data.positions - 1e-3 * out.gradients.positions
        return carry.at(moved), out.total_energies.data

    count, (_, energies) = counted(model, quick(lambda s: jax.lax.scan(step, s, length=4)), state)
    assert count == 4
    assert (np.diff(energies, axis=0) < 0).all()

    shifts = jnp.asarray([0.0, 1e-3])[:, None, None]
    x = state.particles.data.positions
    noise = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))
    mapped = quick(jax.vmap(lambda s: potential(state.at(x + s * noise)).data))
    count, out = counted(model, mapped, shifts)
    assert count == 1
    close(jax.tree.map(lambda leaf: leaf[0], out), expected)
    alone = potential(state.at(x + shifts[1] * noise)).data
    np.testing.assert_allclose(out.total_energies.data[1], alone.total_energies.data, rtol=1e-13)


def energies_of(potential, state):
    def total(positions, cell):
        return potential(state.at(positions, cell)).data.total_energies.data.sum()

    return total


def test_jax_derivatives_are_the_models_from_one_evaluation(state, potential, expected, model):
    x, h = state.particles.data.positions, state.systems.data.cell
    both = quick(jax.value_and_grad(energies_of(potential, state), (0, 1)))
    count, (value, (by_x, by_h)) = counted(model, both, x, h)
    assert count == 1
    np.testing.assert_allclose(value, expected.energy.sum(), rtol=1e-13)
    np.testing.assert_allclose(by_x, expected.position_gradients, rtol=0, atol=1e-11)
    np.testing.assert_allclose(by_h, expected.cell_gradients, rtol=0, atol=1e-11)

    def everything(x):
        out = potential(state.at(x)).data
        return out.total_energies.data.sum(), out.gradients.positions

    count, ((_, beside), by_x) = counted(
        model, quick(jax.value_and_grad(everything, has_aux=True)), x
    )
    assert count == 1
    np.testing.assert_array_equal(beside, by_x)


def test_the_derivative_equals_a_finite_difference(state, potential):
    """Along a random direction of positions and cell, fourth order in the step."""
    generator = np.random.default_rng(3)
    x, h = state.particles.data.positions, state.systems.data.cell
    dx, dh = (jnp.asarray(generator.normal(size=a.shape)) for a in (x, h))
    total = energies_of(potential, state)
    _, slope = jax.jvp(total, (x, h), (dx, dh))
    step = 1e-4
    along = quick(lambda t: total(x + t * dx, h + t * dh))
    values = [along(k * step) for k, _ in reference.STENCIL]
    difference = sum(w * v for (_, w), v in zip(reference.STENCIL, values, strict=True)) / step
    np.testing.assert_allclose(slope, difference, rtol=1e-8)


def test_derivatives_of_gradients_are_an_error_or_nan(state, potential):
    x = state.particles.data.positions

    def gradients(x):
        return potential(state.at(x)).data.gradients.positions

    for second, at in (
        (jax.grad(lambda x: gradients(x).sum()), x),
        (jax.hessian(lambda x: energies_of(potential, state)(x, None)), x),
        (jax.vmap(jax.grad(lambda x: gradients(x).sum())), x[None]),
    ):
        with pytest.raises(NotImplementedError, match="torchcall: second derivatives of a"):
            second(at)
    assert np.isnan(jax.jvp(gradients, (x,), (x,))[1]).all()


def test_a_derivative_in_charge_is_an_error(state, potential):
    @states.pytree
    class Charged:
        cell: object
        charge: object

    def total(charge):
        systems = state.systems.set_data(Charged(state.systems.data.cell, charge))
        return potential(dataclasses.replace(state, systems=systems)).data.total_energies.data.sum()

    assert np.isfinite(total(jnp.zeros(2)))
    with pytest.raises(NotImplementedError, match=r"torchcall: .*graph\.charge is not supported"):
        jax.grad(total)(jnp.zeros(2))


def test_a_proposal_is_evaluated_and_committed_per_system(state, potential):
    move = Move(jnp.asarray(np.random.default_rng(2).normal(scale=0.05, size=(16, 3))))
    moved = move(state, accept(True, True))
    result = quick(potential)(state, move)
    np.testing.assert_allclose(
        result.data.total_energies.data, potential(moved).data.total_energies.data, rtol=1e-13
    )
    after = result.patch(state, accept(False, True))
    yes = np.asarray(state.particles.data.system.indices == 1)
    for k, accepted in enumerate(yes):
        source = moved if accepted else state
        np.testing.assert_array_equal(
            after.particles.data.positions[k], source.particles.data.positions[k]
        )
    assert states.same_bits(result.patch(state, accept(False, False)), state)


def test_a_sum_with_a_jax_potential_is_differentiable_with_one_call(state, potential, model):
    """The torch potential plus harmonic springs to the origin."""

    def spring(state, patch=None):
        assert patch is None
        atoms, b = state.particles.data, len(state.systems)

        def energies(x):
            per_atom = 0.1 * (x**2).sum(1)
            return jnp.zeros(b, x.dtype).at[atoms.system.indices].add(per_atom)

        x = atoms.positions
        by_x = jax.grad(lambda x: energies(x).sum())(x)
        gradients = PositionAndCell(by_x, jnp.zeros((b, 3, 3), x.dtype))
        return WithPatch(
            PotentialOut(Table(state.systems.keys, energies(x)), gradients, EMPTY), IdPatch()
        )

    total = sum_potentials(potential, spring)
    x = state.particles.data.positions
    count, (result, slope) = counted(
        model,
        quick(lambda x: (total(state.at(x)), jax.grad(energies_of(total, state))(x, None))),
        x,
    )
    assert count == 1
    parts = potential(state).data + spring(state).data
    np.testing.assert_allclose(
        result.data.total_energies.data, parts.total_energies.data, rtol=1e-13
    )
    np.testing.assert_allclose(slope, parts.gradients.positions, rtol=0, atol=1e-11)
    assert isinstance(result.patch, IdPatch)


def test_float32_states_get_float32_results(model):
    state = states.state(model, dtype=np.float32)
    out = quick(make_torch_mliap_from_state(WHOLE, compute_position_and_cell_gradients=True))(state)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(out)} == {"float32"}


def test_a_state_may_be_a_dict_and_the_model_outside_it(state, model, expected):
    plain = dataclasses.replace(model, compute_cell_gradients=False)
    views = make_torch_mliap_potential(
        lambda s: s["atoms"],
        lambda s: s["boxes"],
        lambda s: s["list"],
        plain,
        lambda _: plain.cutoff,
    )
    out = quick(views)(
        {"atoms": state.particles, "boxes": state.systems, "list": state.neighborlist}
    )
    close(out.data, expected)
    assert out.data.gradients.shape == (16, 3)
    assert out.data.total_energies.keys == (SystemId(0), SystemId(1))
