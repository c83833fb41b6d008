"""Padding of an `AtomGraph` to the input of a module."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from torchcall._call.meshes import aligned
from torchcall.mliap._graph import AtomGraph, ListedGraph, check_graph, listed, without_list
from torchcall.mliap._input import AtomGraphInput
from torchcall.mliap._table import Table


class PaddingMasks(NamedTuple):
    """Which entries of a padded graph are real, and the rows of the caller's atoms.

    Attributes:
        atoms: (N,) bool; true for the first `n_atoms`.
        edges: (E,) bool.
        systems: (B,) bool; true for the first b.
        rows: (n,) int32, row of each of the caller's atoms: `padded["pos"][rows]` has their order.
            Rows of the caller's padding atoms are `n_atoms` or more.
        n_atoms: () int32, number of real atoms, and row of the first phantom atom.
        n_edges: () int32, length of the prefix that contains all valid edges.
    """

    atoms: Bool[Array, " N"]
    edges: Bool[Array, " E"]
    systems: Bool[Array, " B"]
    rows: Int[Array, " n"]
    n_atoms: Int[Array, ""]
    n_edges: Int[Array, ""]


def pad_graph(
    graph: AtomGraph,
    *,
    cutoff: float | Float[Array, ...] | Table[Any, Any],
    n_atoms: int | None = None,
    n_edges: int | None = None,
    n_systems: int | None = None,
) -> tuple[AtomGraphInput, PaddingMasks]:
    """Sorts the graph by system and adds the phantoms that modules require; works inside `jit`.

    Real atoms come first, by system and otherwise in the caller's order, then phantom atoms; real
    systems, then phantom ones; valid edges first. The phantom system is a periodic cube of side
    2 × cutoff. Its atoms are at the origin and have the atomic number of the first real atom (1 if
    there is none). Phantom systems have the charge and spin of the first real system: models may
    use these as indices into tables. Unused edge slots are `(p, p)` with offset `(1, 0, 0)`, where
    p is the first phantom atom: finite, in range and beyond the cutoff.

    Args:
        graph: the atoms and their edges.
        cutoff: the model's, in Å; if there are several, the largest.
        n_atoms: rows for atoms, N ≥ n + 1; the smallest number if None.
        n_edges: slots for edges, E ≥ e; the smallest number if None.
        n_systems: rows for systems, B ≥ b + 1; the smallest number if None.
            All axes have at least 2 entries.

    Returns:
        The module's input, floats in the positions' dtype, and the masks.

    Raises:
        ValueError: a shape is wrong, a capacity is too small, or `n_edges` is concrete and outside
            [0, e]; the message names it. A traced `n_edges` is clamped.
        TypeError: positions are not float32 or float64.
    """
    return pad_with(graph, 1, cutoff=cutoff, n_atoms=n_atoms, n_edges=n_edges, n_systems=n_systems)


def pad_with(
    graph: AtomGraph,
    element: int,
    *,
    cutoff: float | Float[Array, ...] | Table[Any, Any],
    n_atoms: int | None = None,
    n_edges: int | None = None,
    n_systems: int | None = None,
) -> tuple[AtomGraphInput, PaddingMasks]:
    """`pad_graph`, where `element` is the atomic number of phantoms if there are no real atoms."""
    n, b, e = check_graph(graph)
    sizes = (
        _capacity("n_atoms", n_atoms, n + 1, f"{n} atoms and one phantom"),
        _capacity("n_edges", n_edges, e, f"{e} edge slots"),
        _capacity("n_systems", n_systems, b + 1, f"{b} systems and one phantom"),
    )
    largest = jnp.max(jnp.asarray(cutoff.data if isinstance(cutoff, Table) else cutoff))
    # Fields that do not matter here would make other programs.
    arrays = without_list(listed(graph))
    return _pad(arrays, largest, sizes, element)


def _capacity(name: str, given: int | None, least: int, why: str) -> int:
    # A symbolic size has a lower bound, which settles this comparison but not that of max().
    least = least if least >= 2 else 2
    if given is None:
        return least
    if given < least:
        raise ValueError(
            f"torchcall: pad_graph: {name}: expected at least {least} (for {why}), got {given}"
        )
    return given


class _Rows(NamedTuple):
    """Padded atoms and edges, and the fields of `PaddingMasks` that belong to them."""

    positions: Array
    numbers: Array
    batch: Array
    edge_index: Array
    offsets: Array
    used_atoms: Array
    used_edges: Array
    rows: Array
    n_atoms: Array


class _Ordered(NamedTuple):
    """Atoms by system, padding last, and edges between their rows."""

    positions: Array
    numbers: Array
    system: Array
    rows: Array
    edge_index: Array


@partial(jax.jit, static_argnums=(2, 3))
def _pad(
    graph: AtomGraph, cutoff: Array, sizes: tuple[int, int, int], element: int
) -> tuple[AtomGraphInput, PaddingMasks]:
    b, e = graph.cell.shape[0], graph.edge_index.shape[1]
    atoms, edges, systems = sizes
    dtype = graph.positions.dtype
    prefix = jnp.int32(e) if graph.n_edges is None else graph.n_edges.astype(jnp.int32)
    prefix = jnp.clip(prefix, 0, e)
    if isinstance(graph, ListedGraph):
        rows = _listed_rows(graph, prefix, atoms, edges)
    else:
        rows = _any_rows(graph, prefix, atoms, edges, element)
    cube = 2 * cutoff.astype(dtype) * jnp.eye(3, dtype=dtype)
    extra = systems - b
    padded: AtomGraphInput = {
        "pos": rows.positions,
        "atomic_numbers": rows.numbers,
        "cell": jnp.concatenate([graph.cell.astype(dtype), jnp.broadcast_to(cube, (extra, 3, 3))]),
        "pbc": jnp.concatenate([graph.pbc.astype(bool), jnp.ones((extra, 3), bool)]),
        "edge_index": rows.edge_index,
        "cell_offsets": rows.offsets,
        "batch": rows.batch,
        "charge": _of_systems(graph.charge, systems, dtype),
        "spin": _of_systems(graph.spin, systems, dtype),
    }
    real_systems = lax.iota(jnp.int32, systems) < b
    return padded, PaddingMasks(
        rows.used_atoms, rows.used_edges, real_systems, rows.rows, rows.n_atoms, prefix
    )


def _listed_rows(graph: AtomGraph, prefix: Array, atoms: int, edges: int) -> _Rows:
    """The list's own arrays: atoms are in order and real, and unused slots are padded."""
    n, b, e = graph.positions.shape[0], graph.cell.shape[0], graph.edge_index.shape[1]
    assert graph.batch is not None
    phantoms = jnp.broadcast_to(graph.atomic_numbers[0], atoms - n)
    offsets = graph.cell_offsets.astype(graph.positions.dtype)
    if edges > e:
        unused = jnp.asarray([1, 0, 0], offsets.dtype)
        offsets = jnp.concatenate([offsets, jnp.broadcast_to(unused, (edges - e, 3))])
    return _Rows(
        _lengthen(graph.positions, atoms),
        jnp.concatenate([graph.atomic_numbers, phantoms]),
        jnp.pad(graph.batch, (0, atoms - n), constant_values=b),
        jnp.pad(graph.edge_index, ((0, 0), (0, edges - e)), constant_values=n),
        offsets,
        lax.iota(jnp.int32, atoms) < n,
        lax.iota(jnp.int32, edges) < prefix,
        lax.iota(jnp.int32, n),
        jnp.int32(n),
    )


def _any_rows(graph: AtomGraph, prefix: Array, atoms: int, edges: int, element: int) -> _Rows:
    n, b, e = graph.positions.shape[0], graph.cell.shape[0], graph.edge_index.shape[1]
    dtype = graph.positions.dtype
    ordered = _in_order(graph)
    p = jnp.sum(ordered.system < b, dtype=jnp.int32)
    real = lax.iota(jnp.int32, atoms) < p
    # p is the row of the first phantom atom; unused edges join it to itself.
    kind = ordered.numbers.dtype
    none = jnp.asarray(element, kind)
    first = jnp.where(p > 0, ordered.numbers[0], none) if n else none
    inside = (ordered.edge_index >= 0) & (ordered.edge_index < p.astype(graph.edge_index.dtype))
    used = (lax.iota(jnp.int32, edges) < prefix) & _lengthen(jnp.all(inside, axis=0), edges)
    index = jnp.pad(ordered.edge_index, ((0, 0), (0, edges - e)))
    offsets = _lengthen(graph.cell_offsets.astype(dtype), edges)
    return _Rows(
        jnp.where(real[:, None], _lengthen(ordered.positions, atoms), 0),
        jnp.where(real, _lengthen(ordered.numbers, atoms), first),
        jnp.where(real, _lengthen(ordered.system, atoms), b),
        jnp.where(used, index, p.astype(index.dtype)),
        jnp.where(used[:, None], offsets, jnp.asarray([1, 0, 0], dtype)),
        real,
        used,
        ordered.rows,
        p,
    )


def _in_order(graph: AtomGraph) -> _Ordered:
    n, b = graph.positions.shape[0], graph.cell.shape[0]
    numbers, index = graph.atomic_numbers, graph.edge_index
    row = lax.iota(jnp.int32, n)
    if graph.batch is None or n == 0:
        system = jnp.zeros(n, jnp.int32)
        return _Ordered(graph.positions, numbers, system, row, index)
    system = jnp.where((graph.batch >= 0) & (graph.batch < b), graph.batch, b)
    # Inside `shard_map`, both branches must vary over the same axes of the mesh.
    positions, numbers, system, row, index = aligned([graph.positions, numbers, system, row, index])

    def unchanged() -> _Ordered:
        return _Ordered(positions, numbers, system, row, index)

    def sort() -> _Ordered:
        _, order = lax.sort((system, row), num_keys=2)
        # Inverted by scatter: XLA:GPU has miscompiled the argsort of a permutation.
        rows = jnp.zeros_like(row).at[order].set(row, unique_indices=True)
        # Indices out of range stay out of range.
        known = (index >= 0) & (index < n)
        moved = jnp.where(known, rows[jnp.where(known, index, 0)].astype(index.dtype), n)
        return _Ordered(positions[order], numbers[order], system[order], rows, moved)

    def sort_if_needed() -> _Ordered:
        return lax.cond(jnp.all(system[1:] >= system[:-1]), unchanged, sort)

    # On a GPU, a condition would synchronise with the host.
    return lax.platform_dependent(cpu=sort_if_needed, default=sort)


def _lengthen(values: Array, length: int) -> Array:
    return jnp.pad(values, [(0, length - values.shape[0])] + [(0, 0)] * (values.ndim - 1))


def _of_systems(values: Array | None, n_systems: int, dtype: Any) -> Array:
    """Values of the systems; phantom systems have the value of the first one, or 0."""
    if values is None or values.shape[0] == 0:
        return jnp.zeros(n_systems, dtype)
    values = values.astype(dtype)
    return jnp.concatenate([values, jnp.broadcast_to(values[0], n_systems - values.shape[0])])
