"""Conversion of other libraries' neighbour lists into our arrays."""

import warnings

import ase.build
import ase.neighborlist
import jax
import numpy as np
import pytest
import vesin

from torchcall.mliap import edges_from_jax_md, edges_from_pairs, geometry_from_ase, neighbor_list

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


@pytest.mark.parametrize("kind", ["Dense", "Sparse", "OrderedSparse"])
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
