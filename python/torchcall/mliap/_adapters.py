"""Converts atoms and neighbour lists of other libraries into the arrays of an `AtomGraph`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from torchcall.mliap._adapter_checks import check_cutoff, check_integers, check_shapes, is_half
from torchcall.mliap._neighbors.frame import make_frame


class EdgeArrays(NamedTuple):
    """The arrays of a neighbour list: ``r = x_j − x_i + S h``.

    Attributes:
        edge_index: (2, E) int32, row 0 sender, row 1 receiver; valid edges first, sorted by sender;
            unused slots ``(N, N)``.
        cell_offsets: (E, 3), S; ``(1, 0, 0)`` in unused slots.
        n_edges: () int32.
        did_overflow: () bool.
    """

    edge_index: Int[Array, "2 E"]
    cell_offsets: Float[Array, "E 3"]
    n_edges: Int[Array, ""]
    did_overflow: Bool[Array, ""]


@dataclass(frozen=True)
class Geometry:
    """Arrays of some systems. Iterates over the arguments of `NeighborListFn.allocate`, in order.

    Attributes:
        positions: (N, 3), in Å.
        cell: (B, 3, 3), rows are lattice vectors, in Å.
        pbc: (B, 3) bool.
        batch: (N,) int32.
        charge: (B,), total charge in e; excluded from the iteration.
        spin: (B,), multiplicity 2S + 1; excluded from the iteration.
    """

    positions: Float[np.ndarray, "N 3"]
    cell: Float[np.ndarray, "B 3 3"]
    pbc: Bool[np.ndarray, "B 3"]
    batch: Int[np.ndarray, " N"]
    charge: Float[np.ndarray, " B"]
    spin: Float[np.ndarray, " B"]

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter((self.positions, self.cell, self.pbc, self.batch))


def geometry_from_ase(atoms: Any, *, dtype: Any = np.float32) -> Geometry:
    """Positions, cells, periodicity, system numbers, charges and spins of ASE atoms.

    ``info["charge"]`` and ``info["spin"]`` have the meaning that FAIRChem (UMA) gives them:

    - charge: ``atoms.info["charge"]``; else the sum of the initial charges, which default to 0.
    - spin: ``atoms.info["spin"]``, the multiplicity 2S + 1 (1 for a singlet); else |M| + 1,
      rounded, where M is the sum of the initial magnetic moments in μB, which default to 0.

    Args:
        atoms: one ``ase.Atoms``, or a sequence of them, one system each.
        dtype: float32 or float64.

    Returns:
        The arrays, so that ``neighbor_list(cutoff).allocate(*geometry_from_ase(atoms))`` works.
        Pass ``charge`` and ``spin`` to `AtomGraph.from_neighbors`.
    """
    systems: Sequence[Any] = [atoms] if hasattr(atoms, "get_positions") else list(atoms)
    sizes = [len(system) for system in systems]
    return Geometry(
        np.concatenate([np.zeros((0, 3)), *(system.get_positions() for system in systems)]).astype(
            dtype
        ),
        np.array([np.asarray(system.cell) for system in systems], dtype).reshape(-1, 3, 3),
        np.array([system.pbc for system in systems], np.bool_).reshape(-1, 3),
        np.repeat(np.arange(len(systems)), sizes).astype(np.int32),
        np.array([_charge(system) for system in systems], dtype),
        np.array([_multiplicity(system) for system in systems], dtype),
    )


def _charge(system: Any) -> float:
    given = system.info.get("charge")
    return float(system.get_initial_charges().sum()) if given is None else _number("charge", given)


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(
            f"torchcall: atoms.info[{name!r}]: expected a finite number, got {value!r}"
        )
    return number


def _multiplicity(system: Any) -> float:
    given = system.info.get("spin")
    if given is not None:
        return _number("spin", given)
    # (N,), or (N, 3) where moments are not collinear.
    moment = np.linalg.norm(np.atleast_1d(system.get_initial_magnetic_moments().sum(axis=0)))
    return float(np.rint(moment)) + 1


def edges_from_pairs(
    senders: Any,
    receivers: Any,
    shifts: Any,
    *,
    n_atoms: int,
    capacity: int | None = None,
    dtype: Any = np.float32,
) -> EdgeArrays:
    """Sorts and pads the lists ``i, j, S`` of vesin (``quantities="ijS"``) or ``ase.neighborlist``.

    Both libraries define ``r = x_j − x_i + S h``, as this package does.

    Args:
        senders: (n,), i.
        receivers: (n,), j.
        shifts: (n, 3), S.
        n_atoms: number of atoms, N.
        capacity: number of slots, at least 2; the number of pairs if None.
        dtype: dtype of the offsets.

    Returns:
        The arrays; ``did_overflow`` is false.

    Raises:
        ValueError: shapes disagree, an atom is out of range, there are more pairs than capacity,
            shifts are not whole numbers, or pairs are there in one direction only (vesin with
            ``full_list=False``).
        TypeError: senders or receivers are not integers.
    """
    where = "torchcall: edges_from_pairs"
    i, j, s = np.asarray(senders), np.asarray(receivers), np.asarray(shifts)
    if i.ndim != 1 or j.shape != i.shape or s.shape != (*i.shape, 3):
        raise ValueError(
            f"{where}: expected shapes (n,), (n,), (n, 3), got {i.shape}, {j.shape}, {s.shape}"
        )
    n = i.shape[0]
    slots = max(2, n) if capacity is None else capacity
    if slots < max(2, n):
        raise ValueError(f"{where}: capacity: expected at least {max(2, n)}, got {capacity}")
    if n and not (min(i.min(), j.min()) >= 0 and max(i.max(), j.max()) < n_atoms):
        raise ValueError(
            f"{where}: expected atoms in [0, {n_atoms}), "
            f"got {min(i.min(), j.min())} to {max(i.max(), j.max())}"
        )
    if n:
        check_integers(where, senders=i, receivers=j)
    if not (np.rint(s) == s).all():
        raise ValueError(
            f"{where}: shifts: expected numbers of lattice vectors, S, got others: vectors in Å?"
        )
    if is_half(*(x.astype(np.int32) for x in (i, j, s))):
        raise ValueError(
            f"{where}: expected each pair in both directions, (i, j, S) and (j, i, −S), got a half "
            "list; ask for a full one"
        )
    order = np.argsort(i, kind="stable")
    edge_index = np.full((2, slots), n_atoms, np.int32)
    edge_index[:, :n] = i[order], j[order]
    offsets = np.tile(np.array([1, 0, 0], dtype), (slots, 1))
    offsets[:n] = s[order]
    return EdgeArrays(
        jnp.asarray(edge_index),
        jnp.asarray(offsets),
        jnp.asarray(np.int32(n)),
        jnp.asarray(np.bool_(False)),
    )


def edges_from_jax_md(
    neighbors: Any,
    positions: Float[Array | np.ndarray, "N 3"],
    cell: Float[Array | np.ndarray, "1 3 3"],
    pbc: Bool[Array | np.ndarray, "1 3"],
    *,
    cutoff: float,
) -> EdgeArrays:
    """Converts a jax-md list of one system, with ``S = −round((x_j − x_i) h⁻¹)``; works in ``jit``.

    jax-md stores pairs without images, and considers the nearest image only. ``did_overflow`` is
    therefore true if the cutoff exceeds half the distance between two opposite periodic faces. It
    is also true if jax-md's own flag is.

    Args:
        neighbors: ``jax_md.partition.NeighborList``, dense, sparse or ordered sparse.
        positions: (N, 3), real space, in Å.
        cell: (1, 3, 3), rows are lattice vectors, in Å.
        pbc: (1, 3) bool.
        cutoff: in Å. Longer pairs of jax-md's list (up to its ``dr_threshold``) are dropped.

    Returns:
        The arrays, with as many slots as jax-md's list (twice as many for an ordered one).

    Raises:
        ValueError: a shape or the cutoff is wrong.
    """
    where = "torchcall: edges_from_jax_md"
    check_cutoff(where, cutoff)
    positions, cell, pbc = jnp.asarray(positions), jnp.asarray(cell), jnp.asarray(pbc)
    check_shapes(
        where,
        positions=(positions, (None, 3)),
        cell=(cell, (1, 3, 3)),
        pbc=(pbc, (1, 3)),
    )
    n_atoms = positions.shape[0]
    index = neighbors.idx
    if neighbors.format.name == "Dense":
        i = jnp.broadcast_to(jnp.arange(n_atoms, dtype=index.dtype)[:, None], index.shape).reshape(
            -1
        )
        j = index.reshape(-1)
    else:
        i, j = index[1], index[0]
        if neighbors.format.name == "OrderedSparse":
            i, j = jnp.concatenate([i, j]), jnp.concatenate([j, i])
    frame = make_frame(positions, cell, pbc, cutoff)
    real = (i < n_atoms) & (j < n_atoms)
    i, j = jnp.where(real, i, 0), jnp.where(real, j, 0)
    difference = positions[j] - positions[i]
    offsets = jnp.where(
        pbc[0], -jnp.round(jnp.dot(difference, frame.inverse[0], precision="highest")), 0
    )
    r = difference + jnp.dot(offsets, cell[0], precision="highest")
    square = jnp.sum(r * r, axis=-1)
    itself = (i == j) & jnp.all(offsets == 0, axis=-1)
    valid = real & ~itself & (jnp.sqrt(square) < cutoff)
    key = jnp.where(valid, i, n_atoms).astype(jnp.int32)
    slots = max(2, key.shape[0])
    pad = slots - key.shape[0]
    key, j = jnp.pad(key, (0, pad), constant_values=n_atoms), jnp.pad(j, (0, pad))
    offsets = jnp.pad(offsets, ((0, pad), (0, 0)))
    _, order = lax.sort((key, lax.iota(jnp.int32, slots)), num_keys=2)
    used = (key[order] < n_atoms)[:, None]
    unused = jnp.array([1, 0, 0], offsets.dtype)
    edge_index = jnp.where(used[:, 0], jnp.stack([key[order], j[order]]), n_atoms).astype(jnp.int32)
    too_long = jnp.any(pbc[0] & (2 * cutoff > frame.heights[0]))
    flag = too_long | (jnp.asarray(neighbors.did_buffer_overflow) != 0) | ~frame.finite
    return EdgeArrays(
        edge_index, jnp.where(used, offsets[order], unused), jnp.sum(valid, dtype=jnp.int32), flag
    )


def edges_from_nvalchemi(
    results: Sequence[Any],
    positions: Float[Array | np.ndarray, "N 3"],
    cell: Float[Array | np.ndarray, "B 3 3"],
    batch: Int[Array | np.ndarray, " N"] | None = None,
    *,
    cutoff: float,
    capacity: int | None = None,
) -> EdgeArrays:
    """Converts a list made by ``nvalchemiops.jax.neighbors``; works in ``jit``.

    That package (nvalchemi-toolkit-ops) defines ``r = x_j − x_i + S h`` for the positions as given,
    as this one does. Tested with its output on a CPU; untested on a GPU.

    ``did_overflow`` is true if an atom has more neighbours than the matrix has columns, if a list
    of fixed capacity is full or its ``metadata_valid`` is false, if ``capacity`` is too small, if
    pairs are there in one direction only (``half_fill=True``, or a list for some atoms), if senders
    are not sorted, or if positions or cell are not finite. What the package reports elsewhere is
    the caller's to check: failures of a prepared state (``state.valid``), and too few tiles of
    ``cluster_tile``.

    Args:
        results: what ``neighbor_list`` or the function of a method returns, in one of two forms:
            ``(neighbor_matrix, num_neighbors[, neighbor_matrix_shifts])``, or
            ``(neighbor_list, neighbor_ptr[, neighbor_list_shifts])``, the latter followed by
            ``num_neighbors, metadata_valid`` if ``coo_capacity`` was given. Without shifts, S is
            zero. Made for all atoms and with ``half_fill=False``; any ``fill_value``.
        positions: (N, 3), real space, in Å. May have moved since the search by as much as the
            search's longer cutoff allows.
        cell: (B, 3, 3), rows are lattice vectors, in Å.
        batch: (N,), system of each atom, nondecreasing; None for one system.
        cutoff: in Å. Longer pairs are dropped, for a list made with a skin.
        capacity: number of slots, at least 2; as many as the results have if None.

    Returns:
        The arrays.

    Raises:
        ValueError: the results have another form, a shape or the cutoff is wrong, or the capacity
            is too small.
        TypeError: indices, counts or shifts are not integers.
    """
    where = "torchcall: edges_from_nvalchemi"
    check_cutoff(where, cutoff)
    positions, cell = jnp.asarray(positions), jnp.asarray(cell)
    systems = 1 if batch is None else None
    check_shapes(where, positions=(positions, (None, 3)), cell=(cell, (systems, 3, 3)))
    n_atoms = positions.shape[0]
    if batch is not None:
        batch = jnp.asarray(batch)
        check_shapes(where, batch=(batch, (n_atoms,)))
        check_integers(where, batch=batch)
    i, j, shifts, listed, complete = _entries(where, [jnp.asarray(x) for x in results], n_atoms)
    slots = max(2, i.shape[0]) if capacity is None else capacity
    if slots < 2:
        raise ValueError(f"{where}: capacity: expected at least 2, got {capacity}")
    if i.shape[0] == 0:
        nothing = np.zeros(0, np.int32)
        empty = edges_from_pairs(
            nothing, nothing, np.zeros((0, 3)), n_atoms=n_atoms, capacity=slots, dtype=cell.dtype
        )
        return empty._replace(did_overflow=~complete)
    listed &= (j >= 0) & (j < n_atoms)
    i, j = jnp.where(listed, i, 0), jnp.where(listed, j, 0)
    lattice = cell[jnp.zeros_like(i) if batch is None else batch[i]]
    numbers, shifts = shifts, shifts.astype(positions.dtype)
    r = positions[j] - positions[i] + jnp.einsum("ek,ekl->el", shifts, lattice, precision="highest")
    valid = listed & (jnp.sqrt(jnp.sum(r * r, axis=-1)) < cutoff)
    half = is_half(*(jnp.where(valid, x.astype(jnp.int32).T, 0).T for x in (i, j, numbers)))
    # Row by row, so senders are sorted already.
    (slot,) = jnp.nonzero(valid, size=slots, fill_value=i.shape[0])
    edge_index = jnp.stack([i, j]).astype(jnp.int32)
    used = slot < i.shape[0]
    unused = jnp.array([1, 0, 0], shifts.dtype)
    n_edges = jnp.sum(valid, dtype=jnp.int32)
    finite = jnp.all(jnp.isfinite(positions)) & jnp.all(jnp.isfinite(cell))
    return EdgeArrays(
        edge_index.at[:, slot].get(mode="fill", fill_value=n_atoms),
        jnp.where(used[:, None], shifts.at[slot].get(mode="fill", fill_value=0), unused),
        jnp.minimum(n_edges, slots),
        ~complete | half | (n_edges > slots) | ~finite,
    )


def _entries(
    where: str, results: Sequence[Array], n_atoms: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Senders, receivers, shifts and validity of all slots; and whether no pair is missing."""
    shapes = [x.shape for x in results]
    check_integers(where, **{f"results[{k}]": x for k, x in enumerate(results) if x.ndim})
    count = jnp.int32
    match shapes:
        case [(rows, width), (counted,), *rest] if rows == counted == n_atoms and rest in (
            [],
            [(rows, width, 3)],
        ):
            j, counts = results[:2]
            i = jnp.broadcast_to(jnp.arange(n_atoms, dtype=j.dtype)[:, None], j.shape)
            listed = jnp.arange(width, dtype=count) < counts[:, None]
            shifts = results[2] if rest else jnp.zeros((*j.shape, 3), count)
            complete = jnp.all((counts >= 0) & (counts <= width))
            return i.reshape(-1), j.reshape(-1), shifts.reshape(-1, 3), listed.reshape(-1), complete
        case [(2, slots), (pointers,), *rest] if pointers == n_atoms + 1 and rest in (
            [],
            [(slots, 3)],
            [(n_atoms,), ()],
            [(slots, 3), (n_atoms,), ()],
        ):
            (i, j), stored = results[0], results[1][-1]
            listed = jnp.arange(slots, dtype=count) < stored
            shifts = results[2] if len(rest) % 2 else jnp.zeros((slots, 3), count)
            in_order = jnp.all((i[1:] >= i[:-1]) | ~listed[1:])
            complete = stored == slots
            if len(rest) > 1:
                needed = jnp.sum(results[-2], dtype=count)
                complete = results[-1] & (stored == needed) & jnp.all(results[-2] >= 0)
            return i, j, shifts, listed, complete & in_order
    raise ValueError(
        f"{where}: expected a neighbour matrix or list of {n_atoms} atoms as its functions return "
        f"them, got arrays of shapes {shapes}"
    )
