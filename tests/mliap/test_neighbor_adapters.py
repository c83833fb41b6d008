"""Conversion of other libraries' neighbour lists into our arrays."""

import re
import warnings

import ase.build
import ase.neighborlist
import jax
import numpy as np
import pytest
import vesin
from lists import listed

from torchcall.mliap import (
    edges_from_jax_md,
    edges_from_nvalchemi,
    edges_from_pairs,
    geometry_from_ase,
    neighbor_list,
)

CUTOFF = 3.0


def pairs(edges):
    n = int(edges.n_edges)
    assert (np.diff(np.asarray(edges.edge_index[0, :n])) >= 0).all()
    rows = np.concatenate(
        [np.asarray(edges.edge_index[:, :n]).T, np.asarray(edges.cell_offsets[:n])], 1
    )
    return {tuple(row) for row in rows.astype(int).tolist()}


def crystal():
    atoms = ase.build.bulk("Si", cubic=True) * (2, 2, 2)
    atoms.rattle(0.1, seed=1)
    return atoms


def test_several_ase_systems_become_one_batch():
    systems = [crystal(), ase.build.molecule("H2O")]
    nbrs = neighbor_list(CUTOFF).allocate(*geometry_from_ase(systems))
    expected = set()
    for offset, atoms in zip((0, 64), systems, strict=True):
        i, j, s = ase.neighborlist.neighbor_list("ijS", atoms, CUTOFF)
        expected |= {
            (a + offset, b + offset, *map(int, t)) for a, b, t in zip(i, j, s, strict=True)
        }
    assert pairs(nbrs) == expected


def test_vesin_lists_are_sorted_and_padded():
    atoms = crystal()
    positions, cell, _, _ = geometry_from_ase(atoms)
    i, j, s = vesin.NeighborList(cutoff=CUTOFF, full_list=True).compute(
        positions.astype(float), cell[0].astype(float), True, "ijS"
    )
    edges = edges_from_pairs(i, j, s, n_atoms=len(atoms), capacity=len(i) + 9)
    assert pairs(edges) == pairs(neighbor_list(CUTOFF).allocate(*geometry_from_ase(atoms)))
    assert np.asarray(edges.edge_index[:, -9:] == 64).all()
    with pytest.raises(ValueError, match=r"^torchcall: edges_from_pairs: capacity"):
        edges_from_pairs(i, j, s, n_atoms=len(atoms), capacity=4)


@pytest.mark.parametrize(
    "kind", [pytest.param("Dense", marks=pytest.mark.slow), "Sparse", "OrderedSparse"]
)
def test_jax_md_lists_get_cell_offsets(kind):
    atoms = crystal()
    atoms.append(atoms[0])  # at the same place
    geometry = geometry_from_ase(atoms)
    positions, cell, pbc, _ = geometry
    with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        partition = pytest.importorskip("jax_md.partition")
        space = pytest.importorskip("jax_md.space")
        displacement, _ = space.periodic(float(cell[0, 0, 0]))
        function = partition.neighbor_list(
            displacement,
            float(cell[0, 0, 0]),
            CUTOFF,
            0.5,
            format=partition.NeighborListFormat[kind],
        )
        theirs = function.allocate(positions % cell[0, 0, 0])
    edges = edges_from_jax_md(theirs, positions, cell, pbc, cutoff=CUTOFF)
    assert not bool(edges.did_overflow)
    assert pairs(edges) == pairs(neighbor_list(CUTOFF).allocate(*geometry))
    assert bool(edges_from_jax_md(theirs, positions, cell, pbc, cutoff=9.0).did_overflow)


def two_systems():
    """Positions outside their cells, a triclinic cell, a system without periodicity."""
    atoms = crystal()
    atoms.set_cell(atoms.cell[:] @ [[1, 0.1, 0], [0, 1, -0.2], [0, 0, 1]], scale_atoms=True)
    atoms.positions[::3] += 2 * atoms.cell[0] - atoms.cell[2]
    return geometry_from_ase([atoms, ase.build.molecule("H2O")])


def matrix_of(found, n_atoms, width, fill):
    """Rows as nvalchemi-toolkit-ops documents them; each row's order is arbitrary."""
    matrix = np.full((n_atoms, width), fill, np.int32)
    shifts, counts = np.zeros((n_atoms, width, 3), np.int32), np.zeros(n_atoms, np.int32)
    for i, j, *shift in np.random.default_rng(0).permutation(sorted(found)):
        if counts[i] < width:
            matrix[i, counts[i]], shifts[i, counts[i]] = j, shift
        counts[i] += 1  # in full: this is how the package reports an overflow
    return matrix, counts, shifts


def list_of(found, n_atoms, capacity, fill):
    """The list of fixed capacity that the package packs from a matrix."""
    matrix, counts, shifts = matrix_of(found, n_atoms, n_atoms, fill)
    rows, columns = np.nonzero(np.arange(n_atoms) < counts[:, None])
    index = np.full((2, capacity), fill, np.int32)
    offsets, n = np.zeros((capacity, 3), np.int32), min(capacity, len(rows))
    index[:, :n] = rows[:n], matrix[rows, columns][:n]
    offsets[:n] = shifts[rows, columns][:n]
    pointers = np.minimum(np.concatenate([[0], np.cumsum(counts)]), capacity).astype(np.int32)
    return index, pointers, offsets, counts, np.array(True)


@pytest.mark.parametrize("fill", [-1, 67], ids=["filled with -1", "filled with N"])
def test_nvalchemi_lists_are_converted_in_a_jitted_function(fill):
    geometry = two_systems()
    expected, found = set(listed(*geometry, CUTOFF)), set(listed(*geometry, CUTOFF + 0.5))
    positions, cell, _, batch = geometry
    n = len(found)

    @jax.jit
    def convert(results):
        return edges_from_nvalchemi(results, positions, cell, batch, cutoff=CUTOFF)

    exact = list_of(found, 67, n, fill)
    forms = [matrix_of(found, 67, 40, fill), exact, exact[:3], list_of(found, 67, n + 5, fill)]
    for results in forms:
        edges = convert(results)
        assert not bool(edges.did_overflow)
        assert pairs(edges) == expected
        unused = slice(int(edges.n_edges), None)
        assert np.asarray(edges.edge_index[:, unused] == 67).all()
        assert (np.asarray(edges.cell_offsets[unused]) == [1, 0, 0]).all()
    most = max(matrix_of(found, 67, 40, fill)[1])
    assert bool(convert(matrix_of(found, 67, most - 1, fill)).did_overflow)
    assert bool(convert(list_of(found, 67, n - 1, fill)).did_overflow)
    assert bool(convert((*exact[:4], np.array(False))).did_overflow)
    options = {"cutoff": CUTOFF, "capacity": len(expected)}
    arguments = (forms[0], positions, cell, batch)
    assert pairs(edges_from_nvalchemi(*arguments, **options)) == expected
    options["capacity"] -= 1
    assert bool(edges_from_nvalchemi(*arguments, **options).did_overflow)
    broken = np.where(np.arange(67)[:, None] == 5, np.nan, positions)
    assert bool(edges_from_nvalchemi(forms[0], broken, cell, batch, cutoff=CUTOFF).did_overflow)
    with pytest.raises(
        ValueError, match=r"^torchcall: edges_from_nvalchemi: .*\(67, 40\), \(66,\)"
    ):
        edges_from_nvalchemi([forms[0][0], forms[0][1][:-1]], *arguments[1:], cutoff=CUTOFF)


def test_nvalchemi_lists_that_lack_pairs_raise_the_flag():
    positions, cell, _, batch = two_systems()
    found = set(listed(*two_systems(), CUTOFF))
    half = {p for p in found if p[2:] > (0, 0, 0) or (p[2:] == (0, 0, 0) and p[0] < p[1])}
    assert 2 * len(half) == len(found)
    by_receiver = [x[::-1] if k == 0 else x for k, x in enumerate(list_of(found, 67, 262, -1))]

    @jax.jit
    def flag(results):
        return edges_from_nvalchemi(results, positions, cell, batch, cutoff=CUTOFF).did_overflow

    assert bool(flag(matrix_of(half, 67, 40, -1)))
    assert bool(flag(by_receiver))


@pytest.mark.parametrize("n_atoms, width", [(0, 4), (0, 0), (3, 0)])
def test_empty_nvalchemi_lists_are_empty(n_atoms, width):
    positions, cell = np.zeros((n_atoms, 3), np.float32), np.eye(3, dtype=np.float32)[None]
    matrix, counts = np.zeros((n_atoms, width), np.int32), np.zeros(n_atoms, np.int32)
    for results in ([matrix, counts], [np.zeros((2, 0), np.int32), np.zeros(n_atoms + 1, int)]):
        edges = edges_from_nvalchemi(results, positions, cell, cutoff=CUTOFF)
        assert int(edges.n_edges) == 0
        assert not bool(edges.did_overflow)
        assert (np.asarray(edges.edge_index) == n_atoms).all()
    if n_atoms:
        assert bool(edges_from_nvalchemi([matrix, counts + 1], positions, cell, cutoff=1.0)[3])


def test_wrong_arrays_are_named():
    positions, cell, pbc, batch = two_systems()
    matrix, counts, shifts = matrix_of(set(listed(*two_systems(), CUTOFF)), 67, 40, -1)

    def convert(results=(matrix, counts, shifts), x=positions, h=cell, of=batch, cutoff=CUTOFF):
        return edges_from_nvalchemi(results, x, h, of, cutoff=cutoff)

    for error, text, use in (
        (ValueError, "cell: expected shape (1, 3, 3), got (2, 3, 3)", lambda: convert(of=None)),
        (ValueError, "cell: expected shape (N, 3, 3), got (3, 3)", lambda: convert(h=cell[0])),
        (ValueError, "batch: expected shape (67,), got (66,)", lambda: convert(of=batch[1:])),
        (ValueError, "positions: expected shape (N, 3)", lambda: convert(x=positions[:, :2])),
        (TypeError, "batch: expected integers", lambda: convert(of=batch + 0.5)),
        (TypeError, "results[2]: expected", lambda: convert((matrix, counts, shifts + 0.5))),
        (ValueError, "cutoff: expected a positive", lambda: convert(cutoff=float("nan"))),
        (
            ValueError,
            "cell: expected shape (1, 3, 3), got (3, 3)",
            lambda: edges_from_jax_md(None, positions, cell[0], pbc, cutoff=CUTOFF),
        ),
    ):
        with pytest.raises(error, match=f"^torchcall: edges_from_.*: {re.escape(text)}"):
            use()


def test_half_lists_and_vectors_instead_of_shifts_are_errors():
    """A half list gave half of the energy, and vectors gave other pairs."""
    atoms = crystal()
    i, j, s, vectors = ase.neighborlist.neighbor_list("ijSD", atoms, CUTOFF)
    for pbc in (True, False):
        half = vesin.NeighborList(cutoff=CUTOFF, full_list=False).compute(
            atoms.positions, atoms.cell[:], pbc, "ijS"
        )
        with pytest.raises(ValueError, match=r"both directions.*got a half list"):
            edges_from_pairs(*half, n_atoms=64)
    with pytest.raises(ValueError, match="shifts: expected numbers of lattice vectors"):
        edges_from_pairs(i, j, vectors, n_atoms=64)
    with pytest.raises(TypeError, match="senders: expected integers, got float64"):
        edges_from_pairs(i.astype(float), j, s, n_atoms=64)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["naive", "cell_list"])
def test_nvalchemi_itself_agrees(method):
    nvalchemi = pytest.importorskip("nvalchemiops.jax.neighbors")
    positions, cell, pbc, batch = two_systems()
    geometry = positions[:64], cell[:1], pbc[:1], batch[:64]
    expected = set(listed(*geometry, CUTOFF))
    positions, cell, pbc, _ = map(jax.numpy.asarray, geometry)
    arguments = {"cell": cell, "pbc": pbc, "method": method}
    as_list = {"return_neighbor_list": True}
    with jax.numpy_dtype_promotion("standard"):
        for options in ({}, as_list, as_list | {"coo_capacity": 2000}):
            made = nvalchemi.neighbor_list(positions, CUTOFF + 0.5, **arguments, **options)
            edges = edges_from_nvalchemi(made, positions, cell, cutoff=CUTOFF)
            assert not bool(edges.did_overflow)
            assert pairs(edges) == expected
        made = nvalchemi.neighbor_list(positions, CUTOFF, **arguments, max_neighbors=2)
        assert bool(edges_from_nvalchemi(made, positions, cell, cutoff=CUTOFF).did_overflow)
