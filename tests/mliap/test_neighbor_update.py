"""Updates inside jit, scan and vmap, the skin, and every way to overflow."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lists import assert_right, pairs

from torchcall.mliap import neighbor_list
from torchcall.mliap._neighbors.native import use_jax

SIDE, CUTOFF = 9.0, 3.0
PBC, BATCH = np.ones((1, 3), bool), np.zeros(60, np.int32)


def system(seed=0):
    rng = np.random.default_rng(seed)
    cell = np.eye(3, dtype=np.float32)[None] * np.float32(SIDE)
    return rng.uniform(0, SIDE, (60, 3)).astype(np.float32), cell


@pytest.fixture(scope="module", params=["native", "in JAX"])
def skinned(request):
    positions, cell = system()
    with nullcontext() if request.param == "native" else use_jax():
        nbrs = neighbor_list(CUTOFF, skin=0.5, capacity_multiplier=1.6).allocate(
            positions, cell, PBC, BATCH
        )
    return nbrs, jax.jit(lambda nbrs, p, c: nbrs.update(p, c))


@pytest.mark.parametrize("scale", [0.02, 0.1, 1.0, 30.0], ids="moves of {} Å".format)
def test_update_equals_vesin_after_random_moves(skinned, scale):
    nbrs, update = skinned
    positions, cell = system()
    rng = np.random.default_rng(3)
    for strain in (0.0, 0.01):
        positions = positions + rng.uniform(-scale, scale, positions.shape).astype(np.float32)
        cell = cell * np.float32(1 + strain)
        nbrs = update(nbrs, positions, cell)
        assert_right(nbrs, positions, cell, PBC, BATCH, CUTOFF)


def test_wrapping_atoms_into_the_cell_does_not_use_up_the_skin(skinned):
    nbrs, _ = skinned
    positions, cell = system()
    held = jax.jit(lambda n, p, c: n.update(p, c))
    shifted = positions + np.float32(SIDE) * np.float32([[1, 0, -2]])
    never = replace(nbrs, schedule="never")
    moved = held(never, shifted, cell)
    assert not bool(moved.did_overflow), moved.why()
    assert pairs(moved) == pairs(nbrs)


def test_a_used_up_skin_raises_the_flag_where_the_list_is_never_rebuilt(skinned):
    nbrs, update = skinned
    positions, cell = system()
    positions[0] += np.float32(0.6)
    assert "skin" in update(replace(nbrs, schedule="never"), positions, cell).why()


def test_vmap_equals_a_loop(skinned):
    nbrs, update = skinned
    _, cell = system()
    many = np.stack([system(seed)[0] for seed in range(3)])
    mapped = jax.jit(jax.vmap(lambda p: nbrs.update(p, jnp.asarray(cell))))(many)
    for k in range(3):
        one = update(nbrs, many[k], cell)
        assert pairs(jax.tree.map(lambda x, k=k: x[k], mapped)) == pairs(one)
        assert bool(mapped.did_overflow[k]) == bool(one.did_overflow)


def test_scan_carries_the_list(skinned):
    nbrs, update = skinned
    positions, cell = system()

    def step(nbrs, k):
        nbrs = nbrs.update(positions + 0.05 * k, jnp.asarray(cell))
        return nbrs, nbrs.n_edges

    last, counts = jax.lax.scan(step, nbrs, jnp.arange(12, dtype=jnp.float32))
    assert pairs(last) == pairs(update(nbrs, positions + np.float32(0.55), cell))
    assert counts.shape == (12,)


def test_nan_positions_raise_the_flag(skinned):
    nbrs, update = skinned
    positions, cell = system()
    positions[7, 1] = np.nan
    assert "not finite" in update(nbrs, positions, cell).why()


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0], ids="a cell of {}".format)
def test_a_bad_cell_raises_the_flag(skinned, value):
    nbrs, update = skinned
    positions, cell = system()
    assert bool(update(nbrs, positions, np.where(cell > 0, np.float32(value), cell)).did_overflow)


def test_a_shrunken_cell_raises_the_flag_and_grow_clears_it(skinned):
    nbrs, update = skinned
    positions, cell = system()
    small = np.float32(0.25)
    failed = update(nbrs, positions * small, cell * small)
    assert bool(failed.did_overflow)
    assert_right(failed.grow(), positions * small, cell * small, PBC, BATCH, CUTOFF)


def test_exceeding_the_capacity_raises_the_flag_for_good(skinned):
    nbrs, update = skinned
    positions, cell = system()
    failed = update(nbrs, positions * np.float32(0.3), cell)
    assert "capacity" in failed.why()
    assert bool(update(failed, positions, cell).did_overflow)


def test_update_refuses_other_shapes_and_dtypes(skinned):
    nbrs, _ = skinned
    positions, cell = system()
    with pytest.raises(ValueError, match=r"^torchcall: .*positions: expected float32 \(60, 3\)"):
        nbrs.update(positions[:5], cell)
    with pytest.raises(TypeError, match=r"^torchcall: .*cell: expected float32 .*got int32"):
        nbrs.update(positions, np.zeros((1, 3, 3), np.int32))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"positions": np.zeros((4, 2), np.float32)}, ValueError, "positions: expected shape"),
        ({"positions": np.full((60, 3), np.nan, np.float32)}, ValueError, "positions: .*finite"),
        ({"cell": np.zeros((3, 3), np.float32)}, ValueError, "cell: expected shape"),
        ({"cell": np.zeros((1, 3, 3), np.float32)}, ValueError, r"cell\[0\]: expected linearly"),
        (
            {"cell": np.eye(3, dtype=np.float32)[None] / 200},
            ValueError,
            r"cell\[0\]: .* at most 400",
        ),
        ({"pbc": np.ones((1, 3), np.int32)}, TypeError, "pbc: expected bool, got int32"),
        ({"batch": np.ones(60, np.int32)}, ValueError, "batch: expected systems in"),
        ({"batch": np.zeros(60, np.float32)}, TypeError, "batch: expected integers, got float32"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_allocate_refuses_bad_input(change, error, text):
    positions, cell = system()
    arguments = {"positions": positions, "cell": cell, "pbc": PBC, "batch": BATCH} | change
    with pytest.raises(error, match=f"^torchcall: .*{text}"):
        neighbor_list(CUTOFF).allocate(**arguments)


@pytest.mark.parametrize("name", ["cutoff", "skin", "capacity_multiplier"])
def test_settings_out_of_range_are_refused(name):
    arguments = {"cutoff": 3.0, name: -1.0}
    with pytest.raises(ValueError, match=f"^torchcall: neighbor_list: {name}: expected"):
        neighbor_list(**arguments)


def test_allocate_under_jit_says_what_to_do():
    positions, cell = system()
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda p: neighbor_list(CUTOFF).allocate(p, cell, PBC, BATCH).n_edges)(positions)


def test_an_energy_over_the_list_is_differentiated_at_fixed_pairs(skinned):
    nbrs, _ = skinned
    positions, cell = system()
    cell = jnp.asarray(cell)

    def energy(x):
        i, j = nbrs.update(x, cell).edge_index
        r = x.at[j].get(mode="fill", fill_value=0.0) - x.at[i].get(mode="fill", fill_value=0.0)
        return jnp.sum(r**2)

    i, j = (np.asarray(ends)[: int(nbrs.n_edges)] for ends in nbrs.edge_index)
    expected = np.zeros_like(positions)
    np.add.at(expected, j, 2 * (positions[j] - positions[i]))
    np.add.at(expected, i, -2 * (positions[j] - positions[i]))
    got = jax.jit(jax.grad(energy))(jnp.asarray(positions))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", ["3", None, True, np.ones(2)], ids=str)
@pytest.mark.parametrize("name", ["cutoff", "skin", "capacity_multiplier"])
def test_settings_that_are_not_numbers_are_refused(name, value):
    arguments = {"cutoff": 3.0, name: value}
    with pytest.raises(TypeError, match=f"^torchcall: neighbor_list: {name}: expected a number"):
        neighbor_list(**arguments)


def test_update_refuses_python_lists(skinned):
    nbrs, _ = skinned
    positions, cell = system()
    with pytest.raises(TypeError, match=r"update: positions: expected an array, got list$"):
        nbrs.update(positions.tolist(), cell)
