"""Concatenates the graphs of a `vmap` into one batched graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from torchcall._call.meshes import aligned
from torchcall._call.rows import over_rows
from torchcall.mliap._graph import AtomGraph


def merge_graphs(graph: AtomGraph, mapped: AtomGraph, count: int) -> AtomGraph:
    """The disjoint union of `count` graphs; atom a of graph k becomes atom `k n + a`, system s
    becomes `k b + s`.

    Args:
        graph: fields with a leading axis of length `count` where `mapped` is true.
        mapped: a bool for each field.
        count: number of graphs.

    Returns:
        The graph of all atoms, of the same class. Its valid edges come first.
    """

    def spread(value: Array, is_mapped: bool) -> Array:
        return value if is_mapped else jnp.broadcast_to(value, (count, *value.shape))

    return _merge(jax.tree.map(spread, graph, mapped))


def with_one_cutoff(model: Any) -> Any:
    """The `TorchMliap` with the largest of its cutoffs, which serves merged graphs.

    Cutoffs by system only set the phantom's size.
    """
    own = model.cutoff
    return replace(model, cutoff=replace(own, keys=own.keys[:1], data=own.data.max().reshape(1)))


def evaluate_merged(
    evaluate: Callable[[Any, AtomGraph], Any], count: int, mapped: AtomGraph, model: Any, graph: Any
) -> tuple[Any, Any]:
    """The rule of `custom_vmap` of a potential's evaluation: `count` graphs as one.

    Args:
        evaluate: maps a model and a graph to a pytree of arrays, whose leading axes are atoms or
            systems.
        count, mapped, graph: see `merge_graphs`.
        model: a `TorchMliap`.

    Returns:
        The arrays with a leading axis of length `count`, and that they have it.
    """
    model = with_one_cutoff(model)
    if count == 0:
        one = jax.tree.map(
            lambda value, has: jax.ShapeDtypeStruct(value.shape[1 if has else 0 :], value.dtype),
            graph,
            mapped,
        )
        specs = jax.eval_shape(evaluate, model, one)
        out = jax.tree.map(lambda spec: jnp.zeros((0, *spec.shape), spec.dtype), specs)
    else:
        rows = (jax.tree.map(lambda _: False, model), mapped)
        out = over_rows(partial(_evaluate_rows, evaluate, count, mapped), rows, (model, graph))
    return out, jax.tree.map(lambda _: True, out)


def _evaluate_rows(
    evaluate: Callable[[Any, AtomGraph], Any], count: int, mapped: AtomGraph, model: Any, graph: Any
) -> Any:
    """`count` graphs as one; fewer where a device has its part of them."""
    for value, has in zip(jax.tree.leaves(graph), jax.tree.leaves(mapped), strict=True):
        count = value.shape[0] if has else count
    merged = evaluate(model, merge_graphs(graph, mapped, count))
    return jax.tree.map(lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), merged)


@jax.jit
def _merge(graph: AtomGraph) -> AtomGraph:
    count, n = graph.positions.shape[:2]
    b, e = graph.cell.shape[1], graph.edge_index.shape[2]
    copy = lax.iota(jnp.int32, count)[:, None]
    if graph.batch is None:
        batch = jnp.broadcast_to(copy, (count, n))
    else:
        # A padding atom of one graph must not join the next graph's first system.
        real = (graph.batch >= 0) & (graph.batch < b)
        batch = jnp.where(real, graph.batch + (copy * b).astype(graph.batch.dtype), count * b)
    shift = (copy * n).astype(graph.edge_index.dtype)[:, None]
    known = (graph.edge_index >= 0) & (graph.edge_index < n)
    edge_index = jnp.where(known, graph.edge_index + shift, count * n)
    edge_index = jnp.moveaxis(edge_index, 0, 1)
    offsets, n_edges = graph.cell_offsets, graph.n_edges
    if n_edges is None:
        edge_index, offsets = edge_index.reshape(2, -1), offsets.reshape(-1, 3)
    else:
        lengths = jnp.clip(n_edges.astype(jnp.int32), 0, e)
        # What no part overwrites stays an unused slot, as graphs of neighbour lists require.
        free = jnp.full((2, count * e), count * n, edge_index.dtype)
        edge_index = _join(edge_index, lengths, 1, free)
        free = jnp.broadcast_to(jnp.asarray([1, 0, 0], offsets.dtype), (count * e, 3))
        offsets = _join(offsets, lengths, 0, free)
        n_edges = jnp.sum(lengths)

    def flat(values: Array | None) -> Array | None:
        return None if values is None else values.reshape(-1, *values.shape[2:])

    return replace(
        jax.tree.map(
            flat, replace(graph, n_edges=None, edge_index=None, batch=None, did_overflow=None)
        ),
        batch=batch.reshape(-1),
        edge_index=edge_index,
        cell_offsets=offsets,
        n_edges=n_edges,
        did_overflow=None if graph.did_overflow is None else jnp.any(graph.did_overflow),
    )


def _join(values: Array, lengths: Int[Array, " R"], axis: int, free: Array) -> Array:
    """Concatenates the first `lengths[k]` entries of each part k, in `free`.

    Args:
        values: parts along `axis`, their entries along the next one.
        lengths: valid entries of each part.
        axis: axis of the parts.
        free: the result without parts. After the valid entries come the last part's others, and
            then those of `free`.
    """
    parts = values.shape[axis]
    # Inside `shard_map`, the carry must vary over the same axes of the mesh as what is placed.
    values, lengths, free = aligned([values, lengths, free])
    starts = jnp.cumsum(lengths) - lengths

    def place(k: Array, joined: Array) -> Array:
        part = lax.dynamic_index_in_dim(values, k, axis, keepdims=False)
        # Whole parts in ascending order: each overwrites the unused slots of the previous one.
        return lax.dynamic_update_slice_in_dim(joined, part, starts[k], axis)

    return lax.fori_loop(0, parts, place, free)
