"""The neighbour list's custom calls on a CPU equal the same stages written in JAX."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from torchcall.mliap import neighbor_list
from torchcall.mliap._neighbors import compact as stages
from torchcall.mliap._neighbors.native import use_jax

CUTOFF, SKIN = 3.0, 0.6
# For programs that are called only once.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def two_systems(seed=0, dtype=np.float32):
    """A batch of a skewed periodic system and a slab, with unwrapped atoms."""
    rng = np.random.default_rng(seed)
    cell = np.array([[[7, 0, 0], [1, 6, 0], [0, 2, 8]], [[5, 0, 0], [0, 6, 0], [0, 0, 0]]], dtype)
    fractions = rng.uniform(-1, 2, (50, 3))
    frames = cell.copy()
    frames[1, 2] = [0, 0, 9]
    batch = np.repeat([0, 1], [30, 20]).astype(np.int32)
    positions = np.einsum("ni,nij->nj", fractions, frames[batch]).astype(dtype)
    return positions, cell, np.array([[True] * 3, [True, True, False]]), batch


def both(function, *operands):
    """The function's results with custom calls and without."""

    def run(*, custom):
        lowered = jax.jit(function).lower(*operands)
        assert ("torchcall_neighbors" in lowered.as_text()) == custom
        return jax.tree.map(np.asarray, lowered.compile(QUICK)(*operands))

    native = run(custom=True)
    with use_jax():
        return native, run(custom=False)


def assert_same_list(native, in_jax):
    for name in ("edge_index", "cell_offsets", "n_edges", "problems"):
        np.testing.assert_array_equal(getattr(native, name), getattr(in_jax, name), err_msg=name)


@pytest.mark.parametrize("dtype", [pytest.param(np.float32, marks=pytest.mark.slow), np.float64])
def test_native_updates_equal_those_in_jax(dtype):
    with jax.enable_x64(dtype is np.float64):
        geometry = two_systems(dtype=dtype)
        start = neighbor_list(CUTOFF, skin=SKIN).allocate(*geometry)
        moved = geometry[0] + np.random.default_rng(1).uniform(-0.1, 0.1, (50, 3)).astype(dtype)
        held = replace(start, schedule="never")
        native, in_jax = both(lambda n, x, h: n.update(x, h), held, moved, geometry[1])
        assert not native.problems
        assert_same_list(native, in_jax)
        native, in_jax = both(lambda n, x, h: n.rebuild(x, h), start, moved, geometry[1])
        assert_same_list(native, in_jax)


def test_pairs_beyond_the_capacity_are_counted_but_not_stored():
    geometry = two_systems()
    start = neighbor_list(CUTOFF, skin=SKIN, capacity_multiplier=1.0).allocate(*geometry)
    held = replace(start, schedule="never")
    closer = geometry[0] * np.float32(0.97), geometry[1] * np.float32(0.97)
    native, in_jax = both(lambda n, x, h: n.update(x, h), held, *closer)
    assert native.n_edges > native.edge_index.shape[1]
    assert_same_list(native, in_jax)


def test_native_updates_under_vmap_equal_those_in_jax():
    positions, cell, pbc, batch = two_systems()
    start = neighbor_list(CUTOFF, skin=SKIN, capacity_multiplier=2.0).allocate(
        positions, cell, pbc, batch
    )
    held = replace(start, schedule="never")
    moves = np.random.default_rng(2).uniform(-0.1, 0.1, (3, 50, 3)).astype(np.float32)
    strains = np.array([1.0, 1.01], np.float32)[:, None, None, None]

    def mapped(positions, cells):
        over_cells = jax.vmap(lambda x, h: held.update(x, h), (None, 0))
        return jax.vmap(over_cells, (0, None))(positions, cells)

    native, in_jax = both(mapped, positions + moves, cell * strains)
    assert native.n_edges.shape == (3, 2)
    assert_same_list(native, in_jax)
    one = held.update(positions + moves[2], cell * strains[1])
    np.testing.assert_array_equal(native.edge_index[2, 1], one.edge_index)


@pytest.mark.parametrize("capacity", [1, 31, 32, 100, 5000])
@pytest.mark.parametrize("density", [0.0, 0.05, 1.0])
def test_set_bits_are_found_in_order(capacity, density):
    bits = np.random.default_rng(3).random(1000) < density
    words = stages.mask_to_words(jnp.asarray(bits))
    native, in_jax = both(partial(stages.compact, capacity=capacity), words)
    expected = np.flatnonzero(bits)[:capacity]
    for word, bit, count in (native, in_jax):
        assert count == bits.sum()
        found = 32 * word[: len(expected)] + bit[: len(expected)]
        np.testing.assert_array_equal(found, expected)


def test_candidates_out_of_range_are_skipped():
    geometry = two_systems()
    start = neighbor_list(CUTOFF, skin=SKIN).allocate(*geometry)
    wild = start.candidates._replace(
        sender=start.candidates.sender.at[3].set(-7),
        receiver=start.candidates.receiver.at[5].set(10**6),
        n_pairs=jnp.int32(2**30),
    )
    held = replace(start, candidates=wild, schedule="never")
    got = jax.jit(lambda n: n.update(*geometry[:2]))(held)
    index = np.asarray(got.edge_index)
    assert index.min() >= 0
    assert index.max() <= 50
