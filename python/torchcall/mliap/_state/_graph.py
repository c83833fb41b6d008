"""Particles, systems and edges of a state, and their conversion to an `AtomGraph`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from torchcall.mliap._graph import AtomGraph, check_graph
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._table import Index, ParticleId, SystemId, Table, rows_of

P = TypeVar("P")
S = TypeVar("S")


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "shifts", "n_edges", "did_overflow"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Edges:
    """A full directed list of pairs: `r = x_j − x_i + S h`, `|r| < cutoff`; a pytree.

    Attributes:
        indices: (e, 2), sender i and receiver j; edges with an index out of range are ignored.
        shifts: (e, 1, 3), S, integer-valued, of any dtype.
        n_edges: (), number of valid edges, which come first; None if they may be anywhere.
        did_overflow: () bool, whether pairs may be missing; energies and gradients are then NaN.
            None means False.
    """

    indices: Index[ParticleId] | Int[Array, "e 2"]
    shifts: Float[Array, "e 1 3"] | Int[Array, "e 1 3"]
    n_edges: Int[Array, ""] | None = None
    did_overflow: Bool[Array, ""] | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["particles", "systems", "edges"],
    meta_fields=[],
)
@dataclass(frozen=True)
class HyperGraph(Generic[P, S]):
    """Atoms in any order, their systems and edges; a pytree.

    Attributes:
        particles: table of `IsTorchMliapParticles`, or such an object itself.
        systems: table of `HasCell`, or such an object itself.
        edges: `Edges`, or anything with `indices` and `shifts`.
    """

    particles: Table[ParticleId, P]
    systems: Table[SystemId, S]
    edges: Edges


class TorchMliapInput(NamedTuple, Generic[P, S]):
    """The input of `torch_mliap_model_fn`.

    Attributes:
        parameters: the potential.
        graph: atoms, systems and edges.
    """

    parameters: TorchMliap
    graph: HyperGraph[P, S]


class Rows(NamedTuple):
    """Keys and data of a table, or of an object in its place."""

    keys: tuple[Any, ...]
    data: Any


def particle_rows(particles: Any) -> Rows:
    """Keys and data of the atoms. Without a table, keys are 0, 1, ….

    Raises:
        TypeError: an attribute is missing.
    """
    return _rows(particles, "particles", "positions", ParticleId)


def system_rows(systems: Any) -> Rows:
    """Keys and data of the systems. Without a table, keys are 0, 1, ….

    Raises:
        TypeError: there is no cell.
    """
    return _rows(systems, "systems", "cell", SystemId)


def _rows(table: Any, name: str, attribute: str, label: type[int]) -> Rows:
    data, keys = table, None
    if not hasattr(table, attribute) and hasattr(table, "data"):
        data, keys = table.data, getattr(table, "keys", None)
    value = required(data, attribute, name)
    n = jnp.shape(getattr(value, "vectors", value))[:1]
    if not n:
        raise ValueError(f"torchcall: {name}.{attribute}: expected an array, got a scalar")
    if keys is None:
        keys = tuple(map(label, range(n[0])))
    if len(keys) != n[0] or len(set(keys)) != n[0]:
        raise ValueError(
            f"torchcall: {name}.keys: expected a different key for each of {n[0]} {name}, "
            f"got {len(keys)} keys, {len(set(keys))} of them different"
        )
    return Rows(tuple(keys), data)


def required(owner: Any, attribute: str, name: str) -> Any:
    """The attribute; raises a TypeError that names it."""
    if not hasattr(owner, attribute):
        raise TypeError(
            f"torchcall: {name}: expected an attribute {attribute!r}, got {type(owner).__name__} "
            "without it"
        )
    return getattr(owner, attribute)


def raise_if_concrete(wrong: Bool[Array, ""], name: str, expected: str, got: Any) -> None:
    """Raises ValueError if `wrong` is concrete and true. Under `jit`, callers use a flag."""
    if not isinstance(wrong, Tracer) and bool(wrong):
        raise ValueError(f"torchcall: {name}: expected {expected}, got {got}")


def cells_of(systems: Rows) -> tuple[Float[Array, "b 3 3"], Bool[Array, "b 3"]]:
    """Lattice vectors, (b, 3, 3) in Å, and periodicity, (b, 3).

    Raises:
        ValueError: a shape is wrong.
    """
    cell = systems.data.cell
    b = len(systems.keys)
    vectors = jnp.asarray(getattr(cell, "vectors", cell))
    if vectors.shape != (b, 3, 3):
        raise ValueError(
            f"torchcall: systems.cell: expected shape {(b, 3, 3)}, got {vectors.shape}"
        )
    pbc = getattr(systems.data, "pbc", getattr(cell, "periodic", None))
    if pbc is None:
        return vectors, jnp.any(lax.stop_gradient(vectors) != 0, axis=-1)
    periodic = jnp.asarray(pbc, bool)
    if periodic.shape not in ((3,), (b, 3)):
        raise ValueError(
            f"torchcall: systems.pbc: expected shape (3,) or {(b, 3)}, got {periodic.shape}"
        )
    return vectors, jnp.broadcast_to(periodic, (b, 3))


def atom_graph(graph: HyperGraph[Any, Any]) -> AtomGraph:
    """The arrays of a graph, valid edges first, floats in the positions' dtype.

    Raises:
        TypeError: an attribute is missing, or a dtype is wrong.
        ValueError: a shape is wrong, or an index has keys that its table lacks.
    """
    particles, systems = particle_rows(graph.particles), system_rows(graph.systems)
    positions = jnp.asarray(particles.data.positions)
    numbers = jnp.asarray(required(particles.data, "atomic_numbers", "particles"))
    if not jnp.issubdtype(numbers.dtype, jnp.integer):
        raise TypeError(
            f"torchcall: particles.atomic_numbers: expected integers, got {numbers.dtype}"
        )
    system = required(particles.data, "system", "particles")
    batch = rows_of(system, systems.keys, "particles.system").astype(jnp.int32)
    cell, pbc = cells_of(systems)
    index, offsets, n_edges = _edge_arrays(graph.edges, particles.keys, batch, len(systems.keys))
    # A list that did overflow counts the edges that it has no room for.
    slots = index.shape[1]
    found = AtomGraph(
        positions=positions,
        atomic_numbers=numbers,
        cell=cell.astype(positions.dtype),
        pbc=pbc,
        batch=batch,
        edge_index=index,
        cell_offsets=offsets,
        n_edges=jnp.clip(n_edges, 0, slots),
        charge=_optional(systems.data, "charge", positions.dtype),
        spin=_optional(systems.data, "spin", positions.dtype),
        did_overflow=(n_edges < 0) | (n_edges > slots),
    )
    check_graph(found)
    return found


def _optional(systems: Any, name: str, dtype: Any) -> Array | None:
    value = getattr(systems, name, None)
    return None if value is None else jnp.asarray(value).astype(dtype)


def _edge_arrays(
    edges: Any, keys: tuple[Any, ...], batch: Array, n_systems: int
) -> tuple[Array, Array, Array]:
    indices = required(edges, "indices", "edges")
    shifts = jnp.asarray(required(edges, "shifts", "edges"))
    pairs = rows_of(indices, keys, "edges.indices")
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise ValueError(
            f"torchcall: edges.indices: expected shape ({pairs.shape[0] if pairs.ndim else 'e'}, 2)"
            f", got {pairs.shape}"
        )
    e = pairs.shape[0]
    if shifts.shape != (e, 1, 3):
        raise ValueError(f"torchcall: edges.shifts: expected shape {(e, 1, 3)}, got {shifts.shape}")
    index, offsets = pairs.T.astype(jnp.int32), shifts.reshape(e, 3)
    n_edges = getattr(edges, "n_edges", None)
    if n_edges is not None:
        return index, offsets, jnp.asarray(n_edges, jnp.int32)
    # An index out of range reads the appended entry: no system.
    system = jnp.append(batch, jnp.int32(n_systems))[index]
    return compact(index, offsets, jnp.all(system < n_systems, axis=0))


@jax.jit
def compact(
    index: Int[Array, "2 e"], offsets: Array, valid: Bool[Array, " e"]
) -> tuple[Int[Array, "2 e"], Array, Int[Array, ""]]:
    """Moves the valid edges to the front, in order. Returns their number; the rest is arbitrary."""
    count = jnp.sum(valid, dtype=jnp.int32)

    def move() -> tuple[Array, Array]:
        e = valid.shape[0]
        to = jnp.where(valid, jnp.cumsum(valid, dtype=jnp.int32) - 1, e)
        return (
            jnp.zeros_like(index).at[:, to].set(index, mode="drop"),
            jnp.zeros_like(offsets).at[to].set(offsets, mode="drop"),
        )

    def move_if_needed() -> tuple[Array, Array]:
        return lax.cond(jnp.all(valid[1:] <= valid[:-1]), lambda: (index, offsets), move)

    # On a GPU, a condition would synchronise with the host.
    index, offsets = lax.platform_dependent(cpu=move_if_needed, default=move)
    return index, offsets, count
