"""Tables, indices, lenses, patches and outputs."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
from states import Atoms, Move, State, accept, same_bits

from torchcall.mliap import (
    EMPTY,
    ComposedPatch,
    IdPatch,
    Index,
    ParticleId,
    PositionAndCell,
    PotentialOut,
    ScaledPotential,
    SystemId,
    Table,
    WithPatch,
    lens,
    sum_potentials,
)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass(frozen=True)
class Nested:
    pair: Pair
    items: Any


def test_a_lens_reads_and_replaces_the_part_at_its_path():
    state = Nested(Pair(1, 2), {"a": [10, 20], "b": (3, 4)})
    for where, old in {
        (lambda s: s.pair.right): 2,
        (lambda s: s.items["a"][1]): 20,
        (lambda s: s.items["b"][-1]): 4,
        (lambda s: s.items): state.items,
        (lambda s: s): state,
    }.items():
        found = lens(where)
        assert found(state) == found.get(state) == old
        changed = found.set(state, "new")
        assert found(changed) == "new"
        assert found.set(changed, old) == state
    assert state == Nested(Pair(1, 2), {"a": [10, 20], "b": (3, 4)})
    assert lens(lambda s: s.pair.left) == lens(lambda s: s.pair.left)


@pytest.mark.parametrize(
    "where",
    [lambda s: s.a + 1, lambda _: 3, lambda s: [*s], lambda s: len(s), lambda s: (s.a, s.b)],
    ids=["arithmetic", "a constant", "iteration", "a function", "two paths"],
)
def test_a_lens_from_anything_but_a_path_is_an_error(where):
    with pytest.raises(TypeError, match="torchcall: lens: expected a path of attributes"):
        lens(where)


def test_replacing_part_of_an_array_with_a_lens_is_an_error():
    with pytest.raises(TypeError, match=r"torchcall: lens: 0: expected a field"):
        lens(lambda s: s[0]).set(jnp.zeros(3), 1)


def test_an_index_refers_to_keys_and_marks_padding():
    index = Index(("a", "b", "c"), jnp.asarray([2, 0, 3, -1, 1]))
    np.testing.assert_array_equal(index.indices_in(("c", "x", "b", "a")), [0, 3, 4, 4, 2])
    np.testing.assert_array_equal(index.valid_mask, [True, True, False, False, True])
    table = Table(("c", "b", "a"), {"x": jnp.asarray([3.0, 2, 1]), "y": jnp.ones(3, bool)})
    rows = table[index]
    np.testing.assert_array_equal(rows["x"], [3, 1, np.nan, np.nan, 2])
    np.testing.assert_array_equal(rows["y"], [True, True, False, False, True])
    assert index[1:3].shape == (2,)
    with pytest.raises(ValueError, match=r"torchcall: Index: expected keys among .*got c"):
        index.indices_in(("a", "b"))


def test_indices_are_made_from_numbers_and_from_values():
    index = Index.integer([1, 0, 1], label=SystemId)
    assert index.keys == (SystemId(0), SystemId(1))
    assert index.cls is SystemId
    assert Index.new(["Si", "C", "Si"]).keys == ("C", "Si")
    np.testing.assert_array_equal(Index.new(["Si", "C", "Si"]).indices, [1, 0, 1])
    assert Index.integer(jnp.zeros(0, jnp.int32), n=2).keys == (0, 1)
    assert Table.arange(jnp.zeros(2), label=ParticleId).index.keys == (0, 1)
    with pytest.raises(TypeError, match="torchcall: Index: expected integers, got float32"):
        Index.integer([0.5])


def output(scale=1.0, keys=2, cell=True):
    positions = scale * jnp.arange(6.0).reshape(2, 3)
    gradients = PositionAndCell(positions, jnp.full((keys, 3, 3), scale)) if cell else positions
    return PotentialOut(
        Table.arange(scale * jnp.arange(1.0, keys + 1), label=SystemId), gradients, EMPTY
    )


def test_outputs_are_linear():
    total = 2.0 * output() + output(3.0) * np.float32(0.5) - output()
    for found, expected in zip(jax.tree.leaves(total), jax.tree.leaves(output(2.5)), strict=True):
        np.testing.assert_allclose(found, expected)
    assert total.hessians is EMPTY


@pytest.mark.parametrize(
    "other, part",
    [(output(keys=3), "total_energies"), (output(cell=False), "gradients")],
    ids=["other systems", "other gradients"],
)
def test_adding_outputs_of_different_structure_is_an_error(other, part):
    with pytest.raises(
        ValueError, match=f"torchcall: PotentialOut: {part}: expected the same structure"
    ):
        output() + other


def small_state():
    atoms = Atoms(jnp.ones((4, 3)), jnp.ones(4, int), Index.integer([0, 1, 1, 0], label=SystemId))
    return State(Table.arange(atoms), None, None, None, jnp.zeros(2))


@states.pytree
class Count:
    """Counts the systems in which it was accepted."""

    def __call__(self, state, accept):
        return lens(lambda s: s.cache).set(state, state.cache + accept.data.astype(float))


def counting(state, patch=None):
    del state, patch
    return WithPatch(output(), Count())


def test_sums_and_multiples_make_the_change_once_and_store_each_output():
    state, move = small_state(), Move(jnp.ones((4, 3)))
    total = sum_potentials(counting, ScaledPotential(sum_potentials(counting, counting), 2.0))
    result = total(state, move)
    np.testing.assert_array_equal(result.data.total_energies.data, [5.0, 10.0])
    after = jax.jit(lambda patch, s, a: patch(s, a))(result.patch, state, accept(True, False))
    np.testing.assert_array_equal(after.cache, [3, 0])
    np.testing.assert_array_equal(after.particles.data.positions[:, 0], [2, 1, 1, 2])
    assert same_bits(result.patch(state, accept(False, False)), state)
    np.testing.assert_array_equal(total(state).patch(state, accept(True, True)).cache, [3, 3])


def test_an_empty_sum_and_a_scale_per_atom_are_errors():
    with pytest.raises(ValueError, match="torchcall: SummedPotential: expected at least one"):
        sum_potentials()
    with pytest.raises(ValueError, match=r"torchcall: ScaledPotential: scale: .*got \(3,\)"):
        ScaledPotential(counting, jnp.ones(3))


def test_patches_are_pytrees_applied_in_order():
    state, move = small_state(), Move(jnp.ones((4, 3)))
    both = ComposedPatch((move, IdPatch(), move))
    after = jax.jit(lambda p, s: p(s, accept(True, True)))(both, state)
    np.testing.assert_array_equal(after.particles.data.positions, 3.0)


def test_kups_methods_of_lenses_indices_and_patches():
    assert lens(lambda s: s.pair).focus(lambda p: p.left) == lens(lambda s: s.pair.left)
    assert Index.integer(jnp.zeros(0, jnp.int32), n=2).num_labels == 2
    assert WithPatch(3, IdPatch()).map_data(lambda x: x + 1).data == 4
