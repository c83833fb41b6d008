"""The native list on a CPU: equal to the list in JAX, on every processor and with any threads."""

import re
from dataclasses import replace

import ase.geometry
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vesin
from lists import assert_right, pairs

from torchcall import _bridge
from torchcall.mliap import neighbor_list
from torchcall.mliap._neighbors.in_jax import compact as stages
from torchcall.mliap._neighbors.native import use_jax
from torchcall.mliap._neighbors.reduction import reduced_bases
from torchcall.mliap._neighbors.sizes import capacity

CUTOFF, SKIN = 3.0, 0.6


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


def moves(seed, shape, dtype=np.float32):
    return np.random.default_rng(seed).uniform(-0.1, 0.1, shape).astype(dtype)


@pytest.fixture
def _allow_avx2():
    yield
    _bridge.forbid_avx2(False)


@pytest.mark.parametrize(
    "dtype, skin",
    [
        (np.float32, 0.0),
        (np.float64, SKIN),
        pytest.param(np.float32, SKIN, marks=pytest.mark.slow),
        pytest.param(np.float64, 0.0, marks=pytest.mark.slow),
    ],
)
def test_native_lists_equal_those_in_jax(dtype, skin):
    with jax.enable_x64(dtype is np.float64):
        geometry = two_systems(dtype=dtype)
        native = neighbor_list(CUTOFF, skin=skin).allocate(*geometry)
        with use_jax():
            in_jax = neighbor_list(CUTOFF, skin=skin).allocate(*geometry)
        assert native.limits is None
        assert in_jax.limits is not None
        assert native.edge_index.shape == in_jax.edge_index.shape
        assert pairs(native) == pairs(in_jax)
        moved = geometry[0] + moves(1, (50, 3), dtype), geometry[1]
        for schedule in ("when-needed", "never") if skin else ("always",):
            both = (
                jax.jit(lambda n, x, h: n.update(x, h))(replace(n, schedule=schedule), *moved)
                for n in (native, in_jax)
            )
            first, second = both
            assert not first.problems
            assert pairs(first) == pairs(second)
            assert_right(first, *moved, *geometry[2:], CUTOFF)


@pytest.mark.usefixtures("_allow_avx2")
def test_a_list_is_the_same_without_avx2():
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            geometry = two_systems(dtype=dtype)
            moved = geometry[0] + moves(1, (50, 3), dtype)
            lists = []
            for forbidden in (True, False):
                _bridge.forbid_avx2(forbidden)
                nbrs = neighbor_list(CUTOFF, skin=SKIN).allocate(*geometry)
                lists += [nbrs, nbrs.update(moved, geometry[1])]
            for one, other in zip(lists[:2], lists[2:], strict=True):
                jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("skin", [0.0, 0.5])
def test_a_list_is_the_same_with_any_number_of_threads(skin):
    rng = np.random.default_rng(0)
    side = 62.0
    positions = rng.uniform(0, side, (12000, 3)).astype(np.float32)
    cell = np.eye(3, dtype=np.float32)[None] * np.float32(side)
    geometry = positions, cell, np.ones((1, 3), bool), np.zeros(12000, np.int32)
    nbrs = neighbor_list(4.0, skin=skin).allocate(*geometry)
    assert_right(nbrs, *geometry, 4.0)
    moved = positions + rng.normal(0, 0.3, positions.shape).astype(np.float32)
    # Inside a program, the threads of XLA take part; outside there is one.
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(lambda n, x: n.update(x, n.cell))(nbrs, moved),
        nbrs.update(moved, cell),
    )


def test_mapped_lists_search_only_when_they_must():
    positions, cell, pbc, batch = two_systems()
    start = neighbor_list(CUTOFF, skin=SKIN, capacity_multiplier=2.0).allocate(
        positions, cell, pbc, batch
    )
    many = np.stack([positions, positions + moves(2, (50, 3)), positions * np.float32(1.2)])
    strains = np.array([1.0, 1.01], np.float32)[:, None, None, None]

    def mapped(positions, cells):
        over_cells = jax.vmap(lambda x, h: start.update(x, h), (None, 0))
        return jax.vmap(over_cells, (0, None))(positions, cells)

    found = jax.jit(mapped)(many, cell * strains)
    assert found.n_edges.shape == (3, 2)
    for i in range(3):
        for k in range(2):
            one = start.update(many[i], cell * strains[k])
            mine = jax.tree.map(lambda x, i=i, k=k: x[i, k], found)
            jax.tree.map(np.testing.assert_array_equal, mine, one)
    references = np.asarray(found.candidates.positions)
    np.testing.assert_array_equal(references[1, 0], positions)
    np.testing.assert_array_equal(references[2, 0], many[2])


def test_pairs_beyond_the_capacity_are_counted_but_not_stored():
    geometry = two_systems()
    start = neighbor_list(CUTOFF, capacity_multiplier=1.0).allocate(*geometry)
    closer = geometry[0] * np.float32(0.8), geometry[1] * np.float32(0.8)
    room = neighbor_list(CUTOFF).allocate(*closer, *geometry[2:])
    failed = start.rebuild(*closer)
    slots = failed.edge_index.shape[1]
    assert int(room.n_edges) > slots
    assert "capacity" in failed.why()
    stored = pairs(replace(failed, n_edges=np.int32(slots)))
    assert stored < pairs(room)
    assert pairs(failed.grow()) == pairs(room)


def test_candidates_out_of_range_raise_the_flag():
    geometry = two_systems()
    start = neighbor_list(CUTOFF, skin=SKIN).allocate(*geometry)
    for wild in (
        start.candidates._replace(sender=start.candidates.sender.at[3].set(-7)),
        start.candidates._replace(receiver=start.candidates.receiver.at[5].set(10**6)),
        start.candidates._replace(n_pairs=jnp.int32(2**30), receiver=start.candidates.receiver + 1),
    ):
        got = replace(start, candidates=wild, schedule="never").update(*geometry[:2])
        assert bool(got.did_overflow)
        assert (np.asarray(got.edge_index) == 50).all()


def test_systems_out_of_range_raise_the_flag():
    geometry = two_systems()
    start = neighbor_list(CUTOFF).allocate(*geometry)
    for batch in (start.batch + 1, start.batch - 1, start.batch[::-1]):
        assert bool(replace(start, batch=batch).update(*geometry[:2]).did_overflow)


def test_allocating_growing_and_eager_updates_compile_nothing():
    geometry = two_systems()
    neighbor_list(CUTOFF, skin=SKIN).allocate(*geometry)
    compiled = []

    def listener(name, _, **details):
        if "compile" in name:
            compiled.append((name, details))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        nbrs = neighbor_list(CUTOFF + 0.1, skin=SKIN).allocate(*geometry)
        nbrs = nbrs.update(geometry[0] * np.float32(0.6), geometry[1]).grow()
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert int(nbrs.problems) == 0
    assert compiled == []


def tilted(dtype=np.float32):
    """Two systems of one lattice each, in lattice vectors that are far from short."""
    short = np.array([[5.0, 0, 0], [1, 4.5, 0], [0.5, -1, 6]])
    change = np.array([[[1, 0, 0], [37, 1, 0], [-50, 20, 1]], [[1, 90, 0], [0, 1, 0], [0, 0, 1]]])
    cells = change @ short
    pbc = np.array([[True] * 3, [True, True, False]])
    rng = np.random.default_rng(4)
    batch = np.repeat([0, 1], [9, 7]).astype(np.int32)
    positions = rng.uniform(0, 1, (16, 3)) @ short
    return positions.astype(dtype), cells.astype(dtype), pbc, batch, short


@pytest.mark.parametrize("native", [True, False])
def test_strongly_tilted_cells_have_the_pairs_of_their_lattice(native):
    with jax.enable_x64(True):
        positions, cells, pbc, batch, short = tilted(np.float64)
        cutoff = 5.0
        if native:
            first = neighbor_list(cutoff, skin=0.4).allocate(positions, cells, pbc, batch)
        else:
            with use_jax():
                first = neighbor_list(cutoff, skin=0.4).allocate(positions, cells, pbc, batch)
        moved = positions + moves(5, positions.shape, np.float64)
        lists = [(first, positions)] + ([(first.update(moved, cells), moved)] if native else [])
        for nbrs, x in lists:
            assert not bool(nbrs.did_overflow), nbrs.why()
            n = int(nbrs.n_edges)
            i, j = np.asarray(nbrs.edge_index[:, :n])
            offsets = np.asarray(nbrs.cell_offsets[:n])
            r = x[j] - x[i] + np.einsum("ek,ekl->el", offsets, cells[batch[i]])
            found = {(a, b, *v) for a, b, v in zip(i, j, np.round(r, 6).tolist(), strict=True)}
            assert len(found) == n
            expected = set()
            for s in range(2):
                own = np.flatnonzero(batch == s)
                search = vesin.NeighborList(cutoff=cutoff, full_list=True)
                lattice = np.where(pbc[s][:, None], short, 0)
                a, b, vector = search.compute(x[own], lattice, pbc[s].tolist(), "ijD")
                expected |= {
                    (own[p], own[q], *v)
                    for p, q, v in zip(a, b, np.round(vector, 6).tolist(), strict=True)
                }
            key = lambda row: tuple(round(v, 5) + 0.0 for v in row)  # noqa: E731
            assert {key(row) for row in found} == {key(row) for row in expected}


def test_bases_are_reduced_as_by_ase():
    rng = np.random.default_rng(7)
    for pbc in (np.ones(3, bool), np.array([True, False, True])):
        for _ in range(20):
            short = np.diag(rng.uniform(2, 6, 3)) + rng.normal(0, 0.5, (3, 3))
            axes = np.flatnonzero(pbc)
            change = np.eye(3)
            for a, b in ((0, 1), (1, 2), (2, 0)):
                if pbc[a] and pbc[b]:
                    step = np.eye(3)
                    step[a, b] = rng.integers(-30, 31)
                    change = step @ change
            cell = change @ short
            (basis,) = reduced_bases(cell[None], pbc[None])
            assert abs(round(np.linalg.det(basis))) == 1
            assert (basis[~pbc] == np.eye(3)[~pbc]).all()
            ours = np.sort(np.linalg.norm((basis @ cell)[axes], axis=1))
            reference, _ = ase.geometry.minkowski_reduce(cell, pbc)
            theirs = np.sort(np.linalg.norm(reference[axes], axis=1))
            # Vectors that are short enough are left as they are.
            np.testing.assert_allclose(ours, theirs, rtol=0.02)


@pytest.mark.parametrize("dtype, known", [(np.float32, 1e3), (np.float64, 1e9)])
def test_tilts_beyond_the_digits_of_the_dtype_are_errors_that_name_the_cell(dtype, known):
    """Factors beyond int32 wrapped around, and the error blamed the positions."""
    short = np.array([[5.0, 0, 0], [1, 4.5, 0], [0.5, -1, 6]])
    positions = np.random.default_rng(2).uniform(0, 4, (5, 3)).astype(dtype)

    def edges(factor):
        cell = np.array([[1, 0, 0], [factor, 1, 0], [0, 0, 1]]) @ short
        geometry = positions, cell[None].astype(dtype), ALL, np.zeros(5, np.int32)
        return int(neighbor_list(4.0).allocate(*geometry).n_edges)

    with jax.enable_x64(dtype is np.float64):
        for exponent in range(1, 17):
            factor = 10.0**exponent
            if factor <= known:
                assert edges(factor) == edges(0)
            else:
                with pytest.raises(ValueError, match=r"cell\[0\]: expected l"):
                    edges(factor)


def test_a_list_beyond_the_free_memory_is_an_error(monkeypatch):
    """A collapsed cell filled the memory, and the system ended the process."""
    monkeypatch.setattr("torchcall.mliap._neighbors.sizes.free_memory", lambda: 2**28)
    rng = np.random.default_rng(0)
    n = 2000
    positions = rng.uniform(0, 12, (n, 3)).astype(np.float32)
    cell = 12 * np.eye(3, dtype=np.float32)[None]
    geometry = positions, cell, np.ones((1, 3), bool), np.zeros(n, np.int32)
    start = neighbor_list(3.0, skin=0.3).allocate(*geometry)
    collapsed = jax.jit(lambda nbrs, x, h: nbrs.update(x, h))(start, positions / 4, cell / 4)
    assert "more pairs within cutoff + skin than capacity" in collapsed.why()
    expected = n * n / 27 * 4 / 3 * np.pi * 27  # by the density
    with pytest.raises(ValueError, match=r"free memory, 0\.2 GiB, got \d+ pairs") as caught:
        collapsed.grow()
    got = int(re.search(r"got (\d+) pairs", str(caught.value))[1])
    np.testing.assert_allclose(got, expected, rtol=0.01)


def test_capacities_are_of_a_fixed_sequence():
    assert [capacity(n) for n in (0, 2, 17, 32, 33, 100, 1000.5)] == [2, 2, 17, 32, 34, 100, 1024]
    sizes = [capacity(n) for n in range(2, 5000)]
    assert all(n <= size <= 1.0625 * n + 1 for n, size in zip(range(2, 5000), sizes, strict=True))
    assert len(set(sizes)) < 150


@pytest.mark.parametrize("slots, density", [(1, 0.05), (31, 1.0), (100, 0.05), (5000, 0.0)])
def test_set_bits_are_found_in_order(slots, density):
    bits = np.random.default_rng(3).random(1000) < density
    word, bit, count = stages.compact(stages.mask_to_words(jnp.asarray(bits)), slots)
    assert int(count) == bits.sum()
    expected = np.flatnonzero(bits)[:slots]
    np.testing.assert_array_equal((32 * word + bit)[: len(expected)], expected)


ONE = (np.zeros((1, 3), np.float32), 6 * np.eye(3, dtype=np.float32)[None])
ALL, FIRST = np.ones((1, 3), bool), np.zeros(1, np.int32)


def test_several_lists_or_a_traced_one_are_errors_outside_vmap_and_jit():
    """Lists that `vmap` made were taken for one list: the second had undefined contents."""
    nbrs = neighbor_list(3.0).allocate(*ONE, ALL, FIRST)
    positions, cell = (jnp.stack([a, a]) for a in ONE)
    mapped = jax.vmap(nbrs.update)(positions, cell)
    for use in (lambda: mapped.update(positions, cell), mapped.grow, mapped.why):
        with pytest.raises(ValueError, match=r"^torchcall: .*expected one list, got \(2,\) lists"):
            use()
    again = jax.vmap(lambda nbrs, x, h: nbrs.update(x, h))(mapped, positions, cell)
    assert again.n_edges.tolist() == [0, 0]
    for use in (lambda nbrs: nbrs.grow(), lambda nbrs: (nbrs.why(), nbrs)[1]):
        with pytest.raises(TypeError, match=r"^torchcall: .*got a traced one: call it outside jit"):
            jax.jit(use)(nbrs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cutoffs_beyond_the_range_of_the_dtype(dtype):
    """The first took forever. Coincident atoms are pairs at any cutoff."""
    positions = np.array([[0, 0, 0], [0, 0, 0], [1, 2, 3]], dtype)
    rest = (np.zeros((1, 3, 3), dtype), ~ALL, np.zeros(3, np.int32))
    with jax.enable_x64(True):
        for cutoff, edges in ((1e-320, 2), (1e-30, 2), (1e30, 6), (1e200, 6)):
            assert int(neighbor_list(cutoff).allocate(positions, *rest).n_edges) == edges
    with pytest.raises(ValueError, match=r"^torchcall: neighbor_list: cutoff: expected a positive"):
        neighbor_list(10**400)


def test_too_many_slots_are_an_error():
    with pytest.raises(ValueError, match=r"expected at most 2\*\*30 slots.*got 6 pairs within 7 Å"):
        neighbor_list(7.0, capacity_multiplier=1e300).allocate(*ONE, ALL, FIRST)


def test_an_empty_system_follows_its_cell():
    empty = (np.zeros((0, 3), np.float32), ONE[1], ALL, np.zeros(0, np.int32))
    nbrs = neighbor_list(3.0, skin=0.5).allocate(*empty).update(empty[0], 2 * ONE[1])
    np.testing.assert_array_equal(nbrs.cell, 2 * ONE[1])
