"""Errors when a potential is made, and on its first call before the model is evaluated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
from reference import one_thread  # noqa: F401

from torchcall.mliap import (
    EMPTY,
    Edges,
    HyperGraph,
    Index,
    PotentialOut,
    SystemId,
    Table,
    TorchMliapInput,
    empty_cache,
    lens,
    make_torch_mliap_from_state,
    make_torch_mliap_potential,
    sum_potentials,
    torch_mliap_model_fn,
)

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        return states.model()


@pytest.fixture(scope="module")
def state(model):
    with jax.enable_x64(True):
        return states.state(model)


def make(potential, flag=True, **options):
    given = {
        "particles_view": lambda s: s.particles,
        "systems_view": lambda s: s.systems,
        "neighborlist_view": lambda s: s.neighborlist,
        "model": potential,
        "cutoffs_view": lambda s: s.torch_mliap_model.cutoff,
        "compute_cell_gradients": flag,
    }
    return make_torch_mliap_potential(**(given | options))


@pytest.mark.parametrize("flag", [True, False])
def test_compute_cell_gradients_must_agree_between_model_and_potential(model, flag):
    other = dataclasses.replace(model, compute_cell_gradients=not flag)
    text = f"torchcall: compute_cell_gradients: .*got {flag} and {not flag}"
    with pytest.raises(ValueError, match=text):
        make(other, flag)
    assert make(dataclasses.replace(other, compute_cell_gradients=flag), flag)


@pytest.mark.parametrize("flag", [True, False])
def test_compute_cell_gradients_of_a_states_model_is_checked_before_the_call(model, state, flag):
    other = dataclasses.replace(model, compute_cell_gradients=not flag)
    given = dataclasses.replace(state, torch_mliap_model=other)
    before = model.wrapper.stats()["calls"]
    for potential in (
        make_torch_mliap_from_state(lambda s: s, compute_position_and_cell_gradients=flag),
        make(lambda s: s.torch_mliap_model, flag),
    ):
        with pytest.raises(ValueError, match="compute_cell_gradients: expected the same value"):
            jax.jit(potential)(given)
    assert model.wrapper.stats()["calls"] == before


@pytest.mark.parametrize(
    "name, value, text",
    [
        ("particles_view", 3, "particles_view: expected a function of the state, got int"),
        ("systems_view", None, "systems_view: expected a function of the state, got NoneType"),
        ("neighborlist_view", [], "neighborlist_view: expected a function of the state, got list"),
        ("cutoffs_view", 4.2, "cutoffs_view: expected a function of the state, got float"),
        ("model", "file.pt", "model: expected a torchcall.mliap.TorchMliap or a function of"),
        ("compute_cell_gradients", "yes", "compute_cell_gradients: expected True or False, got"),
        ("out_cache_lens", lambda s: s.cache, "out_cache_lens: expected a lens with get and set"),
        ("patch_idx_view", lambda s: s, "patch_idx_view: expected an out_cache_lens with it"),
        ("patch_idx_view", 1, "patch_idx_view: expected a function of the state, got int"),
    ],
)
def test_an_argument_of_the_wrong_type_is_an_error(model, name, value, text):
    with pytest.raises((TypeError, ValueError), match=f"torchcall: {text}"):
        make(model, **{name: value})


def test_a_state_instead_of_a_view_and_a_cache_of_a_sum_are_errors(model, state):
    with pytest.raises(TypeError, match="torchcall: make_torch_mliap_from_state: state: expected"):
        make_torch_mliap_from_state(state)
    with pytest.raises(TypeError, match="torchcall: empty_cache: potential: expected a result"):
        empty_cache(sum_potentials(make(model)), state)


def broken_states(state):
    """Broken states, by the error's text."""
    atoms, boxes = state.particles.data, state.systems.data
    edges = state.neighborlist.edges

    def particles(**fields):
        data = dataclasses.replace(atoms, **fields)
        return dataclasses.replace(state, particles=state.particles.set_data(data))

    def systems(**fields):
        data = dataclasses.replace(boxes, **fields)
        return dataclasses.replace(state, systems=state.systems.set_data(data))

    def listed(**fields):
        return dataclasses.replace(
            state, neighborlist=states.Fixed(dataclasses.replace(edges, **fields))
        )

    keys = Table(tuple(range(15)), atoms)
    return {
        r"particles\.atomic_numbers: expected integers, got float64": particles(
            atomic_numbers=jnp.ones(16)
        ),
        r"graph\.atomic_numbers: expected shape \(16,\), got \(15,\)": particles(
            atomic_numbers=jnp.ones(15, int)
        ),
        r"graph\.positions: expected float32 or float64, got int": particles(
            positions=jnp.ones((16, 3), int)
        ),
        r"particles\.system: expected keys among \(0, 1\), got 7": particles(
            system=Index((0, 7), jnp.zeros(16, int))
        ),
        r"particles\.system: expected integers, got float64": particles(system=jnp.zeros(16)),
        r"particles: expected an attribute 'positions'": dataclasses.replace(state, particles=3),
        r"particles: expected an attribute 'system', got Bare": dataclasses.replace(
            state, particles=Bare(atoms.positions, atoms.atomic_numbers)
        ),
        r"particles\.keys: expected a unique key for each of 16": dataclasses.replace(
            state, particles=keys
        ),
        r"systems: expected an attribute 'cell', got dict": dataclasses.replace(state, systems={}),
        r"systems\.cell: expected shape \(2, 3, 3\), got \(2, 3\)": systems(cell=jnp.ones((2, 3))),
        r"systems\.pbc: expected shape \(3,\) or \(2, 3\), got \(2,\)": systems(
            pbc=jnp.ones(2, bool)
        ),
        r"edges\.indices: expected shape \(4, 2\), got \(4, 3\)": listed(
            indices=jnp.zeros((4, 3), int)
        ),
        r"edges\.shifts: expected shape \(\d+, 1, 3\), got \(5, 3\)": listed(
            shifts=jnp.zeros((5, 3))
        ),
        r"neighborlist: expected a callable .*got Edges": dataclasses.replace(
            state, neighborlist=edges
        ),
        r"model: expected a torchcall\.mliap\.TorchMliap, got int": dataclasses.replace(
            state, torch_mliap_model=3
        ),
    }


@states.pytree
class Bare:
    positions: object
    atomic_numbers: object


PROBLEMS = [
    "atomic_numbers: expected integers",
    "atomic_numbers: expected shape",
    "positions: expected float32",
    "system: expected keys among",
    "system: expected integers",
    "particles: expected an attribute 'positions'",
    "particles: expected an attribute 'system'",
    "keys: expected a unique key",
    "systems: expected an attribute 'cell'",
    "cell: expected shape",
    "pbc: expected shape",
    "indices: expected shape",
    "shifts: expected shape",
    "neighborlist: expected a callable",
    "model: expected a",
]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_error_names_the_broken_attribute(state, model, problem):
    (text, broken), *others = [
        (text, given)
        for text, given in broken_states(state).items()
        if problem in text.replace("\\", "")
    ]
    assert not others
    before = model.wrapper.stats()["calls"]
    with pytest.raises((TypeError, ValueError), match=f"torchcall: {text}"):
        make(lambda s: s.torch_mliap_model, cutoffs_view=lambda _: model.cutoff)(broken)
    assert model.wrapper.stats()["calls"] == before


def test_torch_mliap_model_fn_names_the_wrong_argument(state, model):
    graph = HyperGraph(state.particles, state.systems, state.neighborlist.edges)
    with pytest.raises(TypeError, match=r"torch_mliap_model_fn: parameters: expected a .*got str"):
        torch_mliap_model_fn(TorchMliapInput("model", graph))
    plain = dataclasses.replace(model, compute_cell_gradients=False)
    with pytest.raises(ValueError, match="torch_mliap_model_fn: compute_cell_gradients: expected"):
        torch_mliap_model_fn(TorchMliapInput(plain, graph), compute_cell_gradients=True)


@pytest.mark.parametrize(
    "cutoffs, text",
    [
        (4.2, "expected a table by system, got float"),
        (Table((SystemId(0),), jnp.ones(2)), r"expected shape \(1,\), got \(2,\)"),
        (Table((SystemId(0), SystemId(5)), jnp.ones(2)), r"expected keys among \(0, 5\), got 1"),
        (Table((SystemId(0),), jnp.asarray([jnp.nan])), "expected the model's"),
    ],
    ids=["a number", "another shape", "another system", "not a number"],
)
def test_cutoffs_must_equal_the_models(state, model, cutoffs, text):
    with pytest.raises((TypeError, ValueError), match=f"torchcall: cutoffs: {text}"):
        make(model, cutoffs_view=lambda _: cutoffs)(state)


@pytest.mark.parametrize(
    "accept, text",
    [
        (jnp.ones(2, bool), "expected a table of booleans by system, got"),
        (Table((0, 1), jnp.ones(2)), "expected booleans, got float32"),
        (Table((0, 1), jnp.ones(3, bool)), r"expected shape \(2,\), got \(3,\)"),
        (Table((0,), jnp.ones(1, bool)), r"expected keys among \(0,\), got 1"),
    ],
    ids=["an array", "numbers", "another shape", "one system less"],
)
def test_acceptance_must_be_a_table_of_booleans_by_system(model, accept, text):
    potential, start = states.cached(model)
    patch = potential(start).patch
    with pytest.raises((TypeError, ValueError), match=f"torchcall: accept: {text}"):
        patch(start, accept)


def test_a_patch_idx_view_of_another_structure_is_an_error(model):
    for view, text in {
        lambda _: 3: "expected an output with indices for its parts, got int",
        lambda s: PotentialOut(s.systems.index, s.particles.data.system, EMPTY): (
            "gradients.positions: expected"
        ),
        lambda s: PotentialOut(s.particles.data.system, EMPTY, EMPTY): (
            r"total_energies: expected a system for each of 2 rows, got shape \(16,\)"
        ),
    }.items():
        potential, start = states.cached(model, patch_idx_view=view)
        if "gradients.positions" in text:
            # One index cannot serve two parts: neither is written.
            cache = potential(start).patch(start, states.accept(True, True)).cache
            assert np.isnan(cache.gradients.positions).all()
            assert not cache.known.any()
            continue
        with pytest.raises((TypeError, ValueError), match=f"torchcall: patch_idx_view: {text}"):
            potential(start)


def test_a_lens_reads_the_edges_of_a_state(state):
    assert lens(lambda s: s.neighborlist.edges)(state) is state.neighborlist.edges
    assert isinstance(state.neighborlist.edges, Edges)
