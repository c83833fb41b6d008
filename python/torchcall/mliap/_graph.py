"""Atoms with their edges, and their padding to the input of a module."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from torchcall.mliap._input import AtomGraphInput
from torchcall.mliap._neighbors.neighbor_list import NeighborList
from torchcall.mliap._table import Table


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "positions",
        "atomic_numbers",
        "cell",
        "pbc",
        "batch",
        "edge_index",
        "cell_offsets",
        "n_edges",
        "charge",
        "spin",
        "did_overflow",
    ],
    meta_fields=["list_cutoff"],
)
@dataclass(frozen=True)
class AtomGraph:
    """n atoms in b systems with e edge slots: `r = x_j − x_i + S h`, `|r| < cutoff`; a pytree.

    Atoms may be in any order. Those whose `batch` is outside `[0, b)` are padding: they contribute
    nothing, and their edges are ignored.

    Attributes:
        positions: (n, 3), float32 or float64, in Å, wrapped or not.
        atomic_numbers: (n,).
        cell: (b, 3, 3), rows are lattice vectors, in Å.
        pbc: (b, 3) bool, each system's own periodicity.
        batch: (n,), system of each atom; None where b = 1 and every atom is real.
        edge_index: (2, e), row 0 sender i, row 1 receiver j; full directed list, valid edges first.
        cell_offsets: (e, 3), S, integer-valued, of any dtype.
        n_edges: () number of valid edges; None where every slot is valid. Energies and gradients
            are NaN if it is outside [0, e].
        charge: (b,), in e; 0 if None.
        spin: (b,), as the model counts it, often the multiplicity 2S + 1; 0 if None.
        list_cutoff: in Å, static; cutoff of the neighbour list that gave the edges, None if
            unknown.
        did_overflow: () bool, whether a pair may be missing; energies and gradients are then NaN.
            None means False.
    """

    positions: Float[Array, "n 3"]
    atomic_numbers: Int[Array, " n"]
    cell: Float[Array, "b 3 3"]
    pbc: Bool[Array, "b 3"]
    batch: Int[Array, " n"] | None
    edge_index: Int[Array, "2 e"]
    cell_offsets: Float[Array, "e 3"] | Int[Array, "e 3"]
    n_edges: Int[Array, ""] | None = None
    charge: Float[Array, " b"] | None = None
    spin: Float[Array, " b"] | None = None
    list_cutoff: float | None = None
    did_overflow: Bool[Array, ""] | None = None

    @classmethod
    def from_neighbors(
        cls,
        neighbors: NeighborList,
        positions: Float[Array, "n 3"],
        cell: Float[Array, "b 3 3"],
        atomic_numbers: Int[Array, " n"],
        *,
        charge: Float[Array, " b"] | None = None,
        spin: Float[Array, " b"] | None = None,
    ) -> AtomGraph:
        """The graph of a neighbour list that was updated at these positions and cells.

        Args:
            neighbors: the list. If it overflowed, energies and gradients are NaN.
            positions: (n, 3), in Å; energies are differentiable by them.
            cell: (b, 3, 3), in Å; energies are differentiable by it.
            atomic_numbers: (n,).
            charge: (b,), in e.
            spin: (b,), as the model counts it.

        Returns:
            The graph, with the list's cutoff.
        """
        return cls(
            positions=positions,
            atomic_numbers=atomic_numbers,
            cell=cell,
            pbc=neighbors.pbc,
            batch=neighbors.batch,
            edge_index=neighbors.edge_index,
            cell_offsets=neighbors.cell_offsets,
            # The count of an overflowed list includes the edges that did not fit.
            n_edges=jnp.minimum(neighbors.n_edges, neighbors.edge_index.shape[1]),
            charge=charge,
            spin=spin,
            list_cutoff=neighbors.layout.cutoff,
            did_overflow=neighbors.did_overflow,
        )


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
    return _pad(replace(graph, list_cutoff=None, did_overflow=None), largest, sizes, element)


def lacks_edges(graph: AtomGraph) -> Bool[Array, ""] | None:
    """Whether a pair may be missing: the list overflowed, or has more edges than slots.

    Returns:
        () bool, or None if neither is possible.
    """
    if graph.n_edges is None:
        return graph.did_overflow
    outside = (graph.n_edges < 0) | (graph.n_edges > graph.edge_index.shape[1])
    return outside if graph.did_overflow is None else outside | graph.did_overflow


def check_graph(graph: AtomGraph) -> tuple[int, int, int]:
    """Numbers of atoms, systems and edge slots.

    Raises:
        ValueError, TypeError: the message names the field whose shape or dtype is wrong, or
            `n_edges` if it is concrete and outside [0, e].
    """
    n, b = _first_axis(graph, "positions"), _first_axis(graph, "cell")
    e = np.shape(graph.edge_index)[-1] if np.ndim(graph.edge_index) else 0
    expected: dict[str, tuple[int, ...]] = {
        "positions": (n, 3),
        "atomic_numbers": (n,),
        "cell": (b, 3, 3),
        "pbc": (b, 3),
        "batch": (n,),
        "edge_index": (2, e),
        "cell_offsets": (e, 3),
        "n_edges": (),
        "charge": (b,),
        "spin": (b,),
        "did_overflow": (),
    }
    optional = ("batch", "n_edges", "charge", "spin", "did_overflow")
    for name, shape in expected.items():
        value = getattr(graph, name)
        if value is None and name in optional:
            continue
        found = tuple(getattr(value, "shape", ()))
        if found != shape:
            raise ValueError(f"torchcall: graph.{name}: expected shape {shape}, got {found}")
    if graph.batch is None and b != 1:
        raise ValueError(f"torchcall: graph.batch: expected an array for {b} systems, got None")
    if str(graph.positions.dtype) not in ("float32", "float64"):
        raise TypeError(
            f"torchcall: graph.positions: expected float32 or float64, got {graph.positions.dtype}"
        )
    for name in ("atomic_numbers", "batch", "edge_index", "n_edges"):
        value = getattr(graph, name)
        dtype = None if value is None else jnp.result_type(value)
        if dtype is not None and not jnp.issubdtype(dtype, jnp.integer):
            raise TypeError(f"torchcall: graph.{name}: expected integers, got {dtype}")
    if graph.n_edges is not None and not isinstance(graph.n_edges, Tracer):
        count = int(np.asarray(graph.n_edges))
        if not 0 <= count <= e:
            raise ValueError(
                f"torchcall: graph.n_edges: expected 0 to {e}, the number of edge slots, got "
                f"{count}; if the neighbour list overflowed, call its grow()"
            )
    return n, b, e


def _first_axis(graph: AtomGraph, name: str) -> int:
    value: Any = getattr(graph, name)
    shape = np.shape(value)
    if not shape:
        raise ValueError(f"torchcall: graph.{name}: expected an array, got a scalar")
    return shape[0]


def _capacity(name: str, given: int | None, least: int, why: str) -> int:
    least = max(2, least)
    if given is None:
        return least
    if given < least:
        raise ValueError(
            f"torchcall: pad_graph: {name}: expected at least {least} (for {why}), got {given}"
        )
    return given


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
    n, b, e = graph.positions.shape[0], graph.cell.shape[0], graph.edge_index.shape[1]
    atoms, edges, systems = sizes
    dtype = graph.positions.dtype
    ordered = _in_order(graph)

    p = jnp.sum(ordered.system < b, dtype=jnp.int32)
    real = lax.iota(jnp.int32, atoms) < p
    # p is the row of the first phantom atom; unused edges join it to itself.
    kind = ordered.numbers.dtype
    none = jnp.asarray(element, kind)
    first = jnp.where(p > 0, ordered.numbers[0], none) if n else none
    numbers = jnp.where(real, _lengthen(ordered.numbers, atoms), first)

    prefix = jnp.int32(e) if graph.n_edges is None else graph.n_edges.astype(jnp.int32)
    prefix = jnp.clip(prefix, 0, e)
    inside = (ordered.edge_index >= 0) & (ordered.edge_index < p.astype(graph.edge_index.dtype))
    used = (lax.iota(jnp.int32, edges) < prefix) & _lengthen(jnp.all(inside, axis=0), edges)
    index = jnp.pad(ordered.edge_index, ((0, 0), (0, edges - e)))
    offsets = _lengthen(graph.cell_offsets.astype(dtype), edges)

    cube = 2 * cutoff.astype(dtype) * jnp.eye(3, dtype=dtype)
    extra = systems - b
    padded: AtomGraphInput = {
        "pos": jnp.where(real[:, None], _lengthen(ordered.positions, atoms), 0),
        "atomic_numbers": numbers,
        "cell": jnp.concatenate([graph.cell.astype(dtype), jnp.broadcast_to(cube, (extra, 3, 3))]),
        "pbc": jnp.concatenate([graph.pbc.astype(bool), jnp.ones((extra, 3), bool)]),
        "edge_index": jnp.where(used, index, p.astype(index.dtype)),
        "cell_offsets": jnp.where(used[:, None], offsets, jnp.asarray([1, 0, 0], dtype)),
        "batch": jnp.where(real, _lengthen(ordered.system, atoms), b),
        "charge": _of_systems(graph.charge, systems, dtype),
        "spin": _of_systems(graph.spin, systems, dtype),
    }
    masks = PaddingMasks(real, used, lax.iota(jnp.int32, systems) < b, ordered.rows, p, prefix)
    return padded, masks


def _in_order(graph: AtomGraph) -> _Ordered:
    n, b = graph.positions.shape[0], graph.cell.shape[0]
    numbers, index = graph.atomic_numbers, graph.edge_index
    row = lax.iota(jnp.int32, n)
    if graph.batch is None or n == 0:
        system = jnp.zeros(n, jnp.int32)
        return _Ordered(graph.positions, numbers, system, row, index)
    system = jnp.where((graph.batch >= 0) & (graph.batch < b), graph.batch, b)

    def unchanged() -> _Ordered:
        return _Ordered(graph.positions, numbers, system, row, index)

    def sort() -> _Ordered:
        _, order = lax.sort((system, row), num_keys=2)
        # Inverted by scatter: XLA:GPU has miscompiled the argsort of a permutation.
        rows = jnp.zeros_like(row).at[order].set(row, unique_indices=True)
        # Indices out of range stay out of range.
        known = (index >= 0) & (index < n)
        moved = jnp.where(known, rows[jnp.where(known, index, 0)].astype(index.dtype), n)
        return _Ordered(graph.positions[order], numbers[order], system[order], rows, moved)

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
