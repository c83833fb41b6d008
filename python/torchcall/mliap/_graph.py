"""Atoms with their edges."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from torchcall._call.specs import type_name
from torchcall.mliap._moved import moved_too_far
from torchcall.mliap._neighbors.neighbor_list import NeighborList

_GEOMETRY = ("list_positions", "list_cell")


class ListArrays(NamedTuple):
    """The arrays that `AtomGraph.from_neighbors` took from a list, to recognise them."""

    edge_index: Array
    cell_offsets: Array
    n_edges: Array
    batch: Array
    pbc: Array


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
        list_positions: (n, 3), in Å, of the neighbour list's last update. Energies and gradients
            are NaN if positions or cell have moved further from it than `from_neighbors` says.
            None: not checked.
        list_cell: (b, 3, 3), in Å, likewise.
        list_skin: in Å, static; the neighbour list's.
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
    list_positions: Float[Array, "n 3"] | None = None
    list_cell: Float[Array, "b 3 3"] | None = None
    list_skin: float = 0.0
    _listed: ListArrays | None = field(default=None, repr=False, compare=False)

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
        check_moved: bool = True,
    ) -> AtomGraph:
        """The graph of a neighbour list that was updated at these positions and cells.

        Energies and gradients are NaN where the list was updated at others, x₀ and h₀: with
        `F = h₀⁻¹ h` over the periodic axes, if an atom's |x − x₀ F|, of its coordinates as given,
        or the Frobenius norm of F − 1 times the cutoff exceeds max(skin/2, 0.05 Å). Within this
        allowance, which finite differences at fixed pairs need, pairs that crossed the cutoff since
        the update are missing or too many: update the list at every step.

        Args:
            neighbors: the list. If it overflowed, energies and gradients are NaN.
            positions: (n, 3), in Å; energies are differentiable by them.
            cell: (b, 3, 3), in Å; energies are differentiable by it.
            atomic_numbers: (n,).
            charge: (b,), in e.
            spin: (b,), as the model counts it.
            check_moved: False leaves this check out. Pairs may then be missing silently.

        Returns:
            The graph, with the list's cutoff.
        """
        slots = neighbors.edge_index.shape[1]
        # The count of an overflowed list includes the edges that did not fit.
        n_edges = lax.min(neighbors.n_edges, np.int32(slots))
        at = lax.stop_gradient((neighbors.positions, neighbors.cell))
        return cls(
            positions=positions,
            atomic_numbers=atomic_numbers,
            cell=cell,
            pbc=neighbors.pbc,
            batch=neighbors.batch,
            edge_index=neighbors.edge_index,
            cell_offsets=neighbors.cell_offsets,
            n_edges=n_edges,
            charge=charge,
            spin=spin,
            list_cutoff=neighbors.layout.cutoff,
            did_overflow=neighbors.did_overflow,
            list_positions=at[0] if check_moved else None,
            list_cell=at[1] if check_moved else None,
            list_skin=neighbors.layout.skin,
            _listed=ListArrays(
                neighbors.edge_index,
                neighbors.cell_offsets,
                n_edges,
                neighbors.batch,
                neighbors.pbc,
            ),
        )


class ListedGraph(AtomGraph):
    """A graph whose batch and edges are a neighbour list's own, as `listed` found.

    So all atoms are real and in order, and unused slots are `(n, n)` with offset `(1, 0, 0)`.
    """


_STATIC = ["list_cutoff", "list_skin"]
_DATA = [f.name for f in fields(AtomGraph) if f.name not in (*_STATIC, "_listed")]
# jax 0.8.1 removes the members of each of drop_fields, where newer ones remove drop_fields.
_DROPPED: Any = ["_listed", ("_listed",)]
for _kind in (AtomGraph, ListedGraph):
    jax.tree_util.register_dataclass(_kind, _DATA, _STATIC, drop_fields=_DROPPED)


def _from_children(aux_data: Any, children: Any) -> AtomGraph:
    return AtomGraph(**dict(zip((*_DATA, *_STATIC), (*children, *aux_data), strict=True)))


# For arguments and results of exported programs.
export.register_pytree_node_serialization(
    AtomGraph,
    serialized_name="torchcall.mliap.AtomGraph",
    serialize_auxdata=lambda static: json.dumps(static).encode(),
    deserialize_auxdata=lambda text: tuple(json.loads(bytes(text))),
    from_children=_from_children,
)


def listed(graph: AtomGraph) -> AtomGraph:
    """The graph as a `ListedGraph`, if its batch and edges are the same objects as in its list.

    A field that was replaced is another object; so is one that entered a compiled function.
    """
    arrays = graph._listed
    if arrays is None or any(getattr(graph, k) is not v for k, v in arrays._asdict().items()):
        return graph
    if graph.positions.shape[0] == 0:
        return graph
    values: dict[str, Any] = {f.name: getattr(graph, f.name) for f in fields(AtomGraph)}
    values["_listed"] = None
    return ListedGraph(**values)


def check_graph(graph: AtomGraph) -> tuple[int, int, int]:
    """Numbers of atoms, systems and edge slots.

    Raises:
        ValueError, TypeError: the message names the field whose shape or dtype is wrong, or
            `n_edges` if it is concrete and outside [0, e].
    """
    if not isinstance(graph, AtomGraph):
        raise TypeError(f"torchcall: graph: expected an AtomGraph, got {type_name(graph)}")
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
        "list_positions": (n, 3),
        "list_cell": (b, 3, 3),
    }
    optional = ("batch", "n_edges", "charge", "spin", "did_overflow", *_GEOMETRY)
    for name, shape in expected.items():
        value = getattr(graph, name)
        if value is None and name in optional:
            continue
        found = tuple(getattr(value, "shape", ()))
        if found != shape:
            raise ValueError(f"torchcall: graph.{name}: expected shape {shape}, got {found}")
    if graph.list_positions is not None and graph.list_cutoff is None:
        raise ValueError(
            "torchcall: graph.list_cutoff: expected the neighbour list's cutoff beside "
            "list_positions, got None"
        )
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


def without_list(graph: AtomGraph) -> AtomGraph:
    """The graph without what it knows of its neighbour list and its overflow, of the same class."""
    return replace(
        graph,
        list_positions=None,
        list_cell=None,
        list_cutoff=None,
        list_skin=0.0,
        did_overflow=None,
        _listed=None,
    )


def lacks_edges(graph: AtomGraph) -> Bool[Array, ""] | None:
    """Whether a pair may be missing.

    The list overflowed, or has more edges than slots, or was updated at a geometry that is too far.

    Returns:
        () bool, or None if nothing of this is possible.
    """
    flags = [] if graph.did_overflow is None else [graph.did_overflow]
    if graph.n_edges is not None:
        flags += [graph.n_edges < 0, graph.n_edges > graph.edge_index.shape[1]]
    if graph.list_positions is not None and graph.list_cell is not None:
        assert graph.list_cutoff is not None  # by check_graph
        moved = moved_too_far(
            graph.positions,
            graph.cell,
            graph.list_positions,
            graph.list_cell,
            graph.pbc,
            graph.batch,
            cutoff=graph.list_cutoff,
            skin=graph.list_skin,
        )
        flags.append(moved)
    return reduce(or_, flags) if flags else None
