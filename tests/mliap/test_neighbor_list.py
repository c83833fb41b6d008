"""The neighbour list equals vesin's as a set of pairs; order, padding and flags as documented."""

from contextlib import nullcontext

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lists import assert_right, pairs

from torchcall.mliap import neighbor_list
from torchcall.mliap._neighbors.native import use_jax


@pytest.fixture(autouse=True, params=["native", "in JAX"], scope="module")
def made(request):
    """Every test of this file runs for both implementations of the list."""
    with nullcontext() if request.param == "native" else use_jax():
        yield


def random_batch(rng, n_systems, dtype=np.float32):
    """Systems of all sizes and periodicities; skewed, flat and needle cells; unwrapped atoms."""
    positions, cells, pbcs, batch = [], [], [], []
    for s in range(n_systems):
        n = int(rng.integers(0, 30))
        lengths = np.exp(rng.uniform(np.log(1.5), np.log(15), 3))
        if rng.random() < 0.2:
            lengths[rng.integers(3)] *= 4
        cell = np.diag(lengths) + rng.normal(0, 0.15, (3, 3)) * lengths[:, None]
        pbc = rng.random(3) < 0.7
        if rng.random() < 0.5:
            cell[~pbc] = 0
        fractions = rng.uniform(-2, 3, (n, 3))
        on_face = rng.random((n, 3)) < 0.15
        fractions = np.where(on_face, np.round(fractions), fractions)
        frame = np.where(pbc[:, None], cell, np.diag(lengths))
        positions.append(fractions @ frame)
        cells.append(cell)
        pbcs.append(pbc)
        batch += [s] * n
    return (
        np.concatenate(positions).astype(dtype),
        np.array(cells, dtype),
        np.array(pbcs),
        np.array(batch, np.int32),
    )


@settings(max_examples=1, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    cutoff=st.floats(0.5, 8.0),
    skin=st.sampled_from([0.0, 0.7]),
)
def test_random_batches_equal_vesin(seed, cutoff, skin):
    geometry = random_batch(np.random.default_rng(seed), 40)
    nbrs = neighbor_list(cutoff, skin=skin).allocate(*geometry)
    assert_right(nbrs, *geometry, cutoff)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), cutoff=st.floats(0.5, 8.0))
def test_many_random_batches_equal_vesin(seed, cutoff):
    geometry = random_batch(np.random.default_rng(seed), 20)
    assert_right(neighbor_list(cutoff).allocate(*geometry), *geometry, cutoff)


def test_tiny_cell_without_atoms_does_not_raise_the_flag():
    cell = np.stack([np.eye(3) * 12, np.eye(3) * 0.1]).astype(np.float32)
    positions = np.random.default_rng(0).uniform(0, 12, (30, 3)).astype(np.float32)
    geometry = positions, cell, np.ones((2, 3), bool), np.zeros(30, np.int32)
    assert_right(neighbor_list(4.0).allocate(*geometry), *geometry, 4.0)


def cube(side, *, pbc=True, dtype=np.float32):
    return np.eye(3, dtype=dtype)[None] * dtype(side), np.full((1, 3), pbc)


def test_one_atom_in_a_tiny_cell_lists_its_own_images():
    cell, pbc = cube(1.0)
    geometry = np.array([[0.3, 5.2, -9.9]], np.float32), cell, pbc, np.zeros(1, np.int32)
    nbrs = neighbor_list(3.3).allocate(*geometry)
    assert_right(nbrs, *geometry, 3.3)
    assert int(nbrs.n_edges) > 100


def test_one_atom_without_periodicity_has_no_pair():
    nbrs = neighbor_list(5.0).allocate(
        np.zeros((1, 3), np.float32), np.zeros((1, 3, 3), np.float32), np.zeros((1, 3), bool), [0]
    )
    assert int(nbrs.n_edges) == 0
    assert not bool(nbrs.did_overflow)
    assert nbrs.edge_index.tolist() == [[1, 1], [1, 1]]


def test_list_of_no_atoms_is_empty():
    cell, pbc = cube(4.0)
    empty = np.zeros((0, 3), np.float32), cell, pbc, np.zeros(0, np.int32)
    nbrs = neighbor_list(5.0, skin=1.0).allocate(*empty)
    nbrs = jax.jit(lambda n, p, c: n.update(p, c))(nbrs, empty[0], cell)
    assert int(nbrs.n_edges) == 0
    assert nbrs.edge_index.shape == (2, 2)


def test_atoms_that_coincide_with_images_of_others_are_listed_at_lattice_distances():
    cell, pbc = cube(4.0)
    positions = np.array([[0, 0, 0], [4, 0, 0], [1, 1, 1]], np.float32)
    nbrs = neighbor_list(4.5).allocate(positions, cell, pbc, np.zeros(3, np.int32))
    found = pairs(nbrs)
    assert (0, 1, -1, 0, 0) in found  # |r| = 0
    assert (0, 1, 0, 0, 0) in found  # |r| = 4
    assert (0, 1, -2, 0, 0) in found
    assert (0, 0, 0, 0, 0) not in found


@pytest.mark.parametrize(
    "below", [True, False], ids=["just below the cutoff", "exactly at the cutoff"]
)
def test_the_cutoff_is_strict_in_float32(below):
    cutoff = np.float32(2.7)
    x = np.nextafter(cutoff, np.float32(0)) if below else cutoff
    positions = np.array([[0, 0, 0], [x, 0, 0]], np.float32)
    nbrs = neighbor_list(float(cutoff)).allocate(
        positions, np.zeros((1, 3, 3), np.float32), np.zeros((1, 3), bool), [0, 0]
    )
    assert int(nbrs.n_edges) == (2 if below else 0)


def test_float64_positions_give_float64_offsets():
    with jax.enable_x64(True):
        geometry = random_batch(np.random.default_rng(5), 6, np.float64)
        assert_right(neighbor_list(3.0).allocate(*geometry), *geometry, 3.0)


def test_list_of_a_thousand_atoms_in_a_skewed_slab_equals_vesin():
    rng = np.random.default_rng(11)
    cell = np.array([[[20, 0, 0], [7, 18, 0], [0, 0, 0]]], np.float32)
    positions = rng.uniform(-15, 40, (1000, 3)).astype(np.float32)
    geometry = positions, cell, np.array([[True, True, False]]), np.zeros(1000, np.int32)
    assert_right(neighbor_list(4.0).allocate(*geometry), *geometry, 4.0)
