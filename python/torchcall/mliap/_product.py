"""The primitive of a Hessian-vector product: symmetric, linear in the vector, of merged graphs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from torchcall._call.meshes import aligned, resharded, results
from torchcall._call.partition import register
from torchcall._call.rows import over_rows, row_factors
from torchcall._undocumented.of_jax import (
    LoweringRuleContext,
    Primitive,
    ShapedArray,
    Zero,
    check_nans,
    lower_fun,
    primitive_batchers,
    primitive_jvps,
    primitive_transposes,
)
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._merge import merge_graphs
from torchcall.mliap._model import TorchMliap

Gradients = tuple[Float[Array, "n 3"], Float[Array, "b 3 3"] | None]
"""By positions and by cells; None unless the model computes these."""

Evaluate = Callable[[TorchMliap, AtomGraph, Array | None, Array | None], Gradients]
Restore = Callable[[Sequence[Any]], tuple[TorchMliap, AtomGraph]]

product_p = Primitive("torchcall_hessian_product")
product_p.multiple_results = True
check_nans(product_p, lambda **_: "torchcall: Hessian-vector product")

# The parameters are:
#   evaluate: the product of one graph.
#   restore: the model and the graph, of their leaves. JAX's caches refer to functions weakly, to
#       other parameters not, and the model has weights.
#   given: whether the vector has a part of the positions, and one of the cells; the last operands.
#   layers: for each `vmap`, the outermost first, whether the leaves have its axis. The vector and
#       the results have all of them, in this order.


def product(
    evaluate: Evaluate,
    model: TorchMliap,
    graph: AtomGraph,
    moves: Array | None,
    strains: Array | None,
) -> Gradients:
    """`evaluate(model, graph, moves, strains)`, with JAX's transformations.

    `vmap` over graphs merges them into one, which each device does with its own. `vmap` over the
    vector alone maps `evaluate`.

    Args:
        evaluate: a symmetric function, linear in `moves` and `strains`.
        model: a potential with one cutoff.
        graph: the atoms.
        moves, strains: (n, 3) and (b, 3, 3), the vector; None: zero.
    """
    leaves, tree = jax.tree.flatten((model, graph))

    def restore(leaves: Sequence[Any]) -> tuple[TorchMliap, AtomGraph]:
        return jax.tree.unflatten(tree, leaves)

    out = _bind(leaves, (moves, strains), evaluate=evaluate, restore=restore, layers=())
    return out[0], out[1] if model.compute_cell_gradients else None


def _bind(leaves: Sequence[Any], vector: Sequence[Any], **params: Any) -> list[Any]:
    given = tuple(part is not None for part in vector)
    operands = aligned([*leaves, *(part for part in vector if part is not None)])
    return product_p.bind(*operands, given=given, **params)


def _vector(parts: Sequence[Any], given: tuple[bool, ...]) -> list[Any]:
    """Both parts of the vector, None where there is none."""
    rest = iter(parts)
    return [next(rest) if has else None for has in given]


@product_p.def_abstract_eval
def _abstract_eval(
    *operands: Any, evaluate: Evaluate, restore: Restore, given: tuple[bool, ...], layers: Any
) -> list[ShapedArray]:
    del evaluate
    specs = _specs(restore, given, layers, operands)
    if not layers:
        return results(specs, operands)
    has = [*layers[0], *[True] * sum(given)]
    return results(
        specs,
        operands,
        [row_factors(x.ndim, rows) for x, rows in zip(operands, has, strict=True)],
        [row_factors(len(spec.shape), True) for spec in specs],
    )


def _specs(
    restore: Restore, given: tuple[bool, ...], layers: Any, operands: Sequence[Any]
) -> list[jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the results."""
    n = len(operands) - sum(given)
    model, graph = restore(operands[:n])
    axes = operands[n].shape[: len(layers)]
    shapes = [graph.positions.shape[-2:], graph.cell.shape[-3:]]
    return [
        jax.ShapeDtypeStruct((*axes, *shape), graph.positions.dtype)
        for shape in shapes[: 2 if model.compute_cell_gradients else 1]
    ]


def _evaluated(
    *operands: Any, evaluate: Evaluate, restore: Restore, given: tuple[bool, ...], layers: Any
) -> list[Any]:
    whole = partial(_whole, evaluate=evaluate, restore=restore, given=given, layers=layers)
    if not layers:
        return whole(*operands)
    return over_rows(whole, [*layers[0], *[True] * sum(given)], operands)


def _whole(
    *operands: Any, evaluate: Evaluate, restore: Restore, given: tuple[bool, ...], layers: Any
) -> list[Any]:
    """The product of the merged graphs, for each vector that they share."""
    n, k = len(operands) - sum(given), len(layers)
    sizes = operands[n].shape[:k]
    if 0 in sizes:
        return [
            jnp.zeros(spec.shape, spec.dtype) for spec in _specs(restore, given, layers, operands)
        ]
    merged = [i for i, mapped in enumerate(layers) if any(mapped)]
    loops = [i for i in range(k) if i not in merged]
    order = [*loops, *merged]
    n_loops, count = (math.prod(sizes[i] for i in axes) for axes in (loops, merged))

    def flat(part: Any) -> Any:
        """(loops, merged atoms or systems, …)"""
        if part is None or not layers:
            return part
        own = range(k, part.ndim)
        part = part.transpose(*order, *own)
        leading = [n_loops] if loops else []
        return part.reshape(*leading, count * part.shape[k], *part.shape[k + 1 :])

    def unflat(values: Any, per_graph: int) -> Any:
        if not layers:
            return values
        axes = [sizes[i] for i in order]
        values = values.reshape(*axes, per_graph, *values.shape[2 if loops else 1 :])
        own = range(k, values.ndim)
        return values.transpose(*(order.index(i) for i in range(k)), *own)

    def repeated(leaf: Any, mapped: Sequence[bool]) -> Any:
        missing = [axis for axis, has in enumerate(mapped) if not has]
        leaf = jnp.expand_dims(leaf, missing)
        own = leaf.shape[len(merged) :]
        leaf = jnp.broadcast_to(leaf, (*(sizes[i] for i in merged), *own))
        return leaf.reshape(count, *own)

    model, graph = restore(operands[:n])
    moves, strains = map(flat, _vector(operands[n:], given))
    atoms, systems = graph.positions.shape[-2], graph.cell.shape[-3]
    if merged:
        leaves = [
            repeated(leaf, [layers[i][j] for i in merged]) for j, leaf in enumerate(operands[:n])
        ]
        model, graph = restore(leaves)
        cutoff = replace(model.cutoff, data=model.cutoff.data.max(axis=0))
        model = replace(model, cutoff=cutoff)
        graph = merge_graphs(graph, jax.tree.map(lambda _: True, graph), count)
    of_one = partial(evaluate, model, graph)
    out = (jax.vmap(of_one) if loops else of_one)(moves, strains)
    per_graph = [atoms, systems]
    return [unflat(x, size) for x, size in zip(out, per_graph, strict=True) if x is not None]


@product_p.def_impl
def _impl(*operands: Any, **params: Any) -> list[Any]:
    return _evaluated(*operands, **params)


def _lower(ctx: LoweringRuleContext, *operands: Any, **params: Any) -> Any:
    def lowered(*operands: Any) -> list[Any]:
        values = _evaluated(*operands, **params)
        return [resharded(v, aval) for v, aval in zip(values, ctx.avals_out, strict=True)]

    return lower_fun(lowered, multiple_results=True)(ctx, *operands)


register(product_p, _lower)


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> Any:
    n = len(primals) - sum(params["given"])
    moving = [i for i, tangent in enumerate(tangents) if type(tangent) is not Zero]
    if moving and moving[0] >= n:
        parts = [None if type(t) is Zero else t for t in tangents[n:]]
        vector = _vector(parts, params["given"])
        rest = {key: value for key, value in params.items() if key != "given"}
        return product_p.bind(*primals, **params), _bind(primals[:n], vector, **rest)

    def of(*values: Any) -> list[Any]:
        operands = list(primals)
        for i, value in zip(moving, values, strict=True):
            operands[i] = value
        return _whole(*operands, **params)  # `over_rows` has no derivatives

    return jax.jvp(of, [primals[i] for i in moving], [tangents[i] for i in moving])


primitive_jvps[product_p] = _jvp


def _transpose(
    cotangents: Sequence[Any],
    *operands: Any,
    restore: Restore,
    given: tuple[bool, ...],
    **params: Any,
) -> list[Any]:
    """The product is symmetric: that of the cotangents."""
    n = len(operands) - sum(given)
    linear = [i for i, has in enumerate(given) if has]
    vector = [None if type(x) is Zero else x for x in cotangents]
    vector += [None] * (2 - len(vector))
    if all(part is None for part in vector):
        return [None] * len(operands)
    out = _bind(operands[:n], vector, restore=restore, **params)
    return [*[None] * n, *(out[i] for i in linear)]


primitive_transposes[product_p] = _transpose


def _batch(
    operands: Sequence[Any],
    axes: Sequence[Any],
    *,
    restore: Restore,
    given: tuple[bool, ...],
    layers: Any,
    **params: Any,
) -> tuple[list[Any], list[int]]:
    n = len(operands) - sum(given)
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = [
        x if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    vector = [
        x if axis is not None else jnp.broadcast_to(x, (size, *x.shape))
        for x, axis in zip(moved[n:], axes[n:], strict=True)
    ]
    layers = (tuple(axis is not None for axis in axes[:n]), *layers)
    out = _bind(moved[:n], _vector(vector, given), restore=restore, layers=layers, **params)
    return out, [0] * len(out)


primitive_batchers[product_p] = _batch
