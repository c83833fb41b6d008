"""Comparison of neighbour lists with vesin's, as sets of pairs."""

import jax.numpy as jnp
import numpy as np
import vesin


def pairs(nbrs):
    n = int(nbrs.n_edges)
    rows = np.concatenate(
        [np.asarray(nbrs.edge_index[:, :n]).T, np.asarray(nbrs.cell_offsets[:n])], 1
    )
    found = {tuple(row) for row in rows.astype(int).tolist()}
    assert len(found) == n, "no pair twice"
    return found


def listed(positions, cell, pbc, batch, cutoff):
    """Pairs and their distances by vesin, in float64, one system at a time."""
    found = {}
    for s in range(len(cell)):
        ids = np.flatnonzero(batch == s)
        if not len(ids):
            continue
        lattice = np.where(pbc[s][:, None], cell[s], 0).astype(float)
        # With small cutoffs vesin fills a large box with millions of cells.
        search = vesin.NeighborList(cutoff=max(cutoff, 2.0), full_list=True)
        i, j, shifts, d = search.compute(
            positions[ids].astype(float), lattice, pbc[s].tolist(), "ijSd"
        )
        for a, b, shift, length in zip(i, j, shifts, d, strict=True):
            if length <= cutoff:
                found[int(ids[a]), int(ids[b]), *map(int, shift)] = float(length)
    return found


def assert_right(nbrs, positions, cell, pbc, batch, cutoff):
    """Equal sets, up to the documented rounding of distances near the cutoff."""
    assert not bool(nbrs.did_overflow), nbrs.why()
    got = pairs(nbrs)
    eps = np.finfo(positions.dtype).eps
    slack = 8 * eps * (np.abs(positions).max(initial=0) * 2 + cutoff + np.abs(cell).sum(initial=0))
    wide = listed(positions, cell, pbc, batch, cutoff + slack)
    assert got <= set(wide)
    assert {p for p, d in wide.items() if d < cutoff - slack} <= got
    n, slots = int(nbrs.n_edges), nbrs.edge_index.shape[1]
    senders = np.asarray(nbrs.edge_index[0])
    assert (np.diff(senders[:n]) >= 0).all()
    assert (np.asarray(nbrs.edge_index[:, n:]) == len(positions)).all()
    assert (np.asarray(nbrs.cell_offsets[n:]) == [1, 0, 0]).all()
    assert nbrs.edge_index.dtype == jnp.int32
    assert nbrs.cell_offsets.dtype == positions.dtype
    assert slots >= 2
