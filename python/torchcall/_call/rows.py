"""Functions of arrays whose rows are independent, such as the energies of several graphs.

If the devices of a program have some rows each, they call the function on their own, and nothing is
gathered: by `shard_map` where the types say so, otherwise where XLA's partitioner finds it so.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from torchcall._call.meshes import count, mesh_of, results
from torchcall._call.partition import Registrations, lower_partitioned, register
from torchcall._call.plan import CallPlan
from torchcall._call.primitive import call_p
from torchcall._call.sharding import Axes, divided
from torchcall._call.specs import any_traced
from torchcall._call.transforms import tangent_p, tangent_plan
from torchcall._undocumented.of_jax import (
    LoweringRuleContext,
    Primitive,
    check_nans,
    lower_fun,
    primitive_batchers,
)

rows_p = Primitive("torchcall_rows")
rows_p.multiple_results = True
check_nans(rows_p, lambda **_: "torchcall: energy")


def over_rows(
    function: Callable[..., Any], has_rows: Sequence[Any], operands: Sequence[Any]
) -> Any:
    """`function(*operands)`, on each device for its own rows.

    Args:
        function: of pytrees of arrays, with any number of rows. Its results have a leading axis,
            that of the rows. Row k depends on row k of the operands that have rows.
        has_rows: per operand, a pytree of bools: whether an array has the rows as its first axis.
        operands: pytrees of arrays.
    """
    arrays, tree = jax.tree.flatten(tuple(operands))
    rows = tuple(jax.tree.leaves(tuple(has_rows)))
    if not any(rows) or not any_traced(arrays) or AxisType.Manual in _axes(arrays):
        return function(*operands)
    structures: list[Any] = []

    def flat(*arrays: Any) -> list[Any]:
        leaves, structure = jax.tree.flatten(function(*jax.tree.unflatten(tree, arrays)))
        structures.append(structure)
        return leaves

    out = _over_rows(jax.jit(flat), rows, arrays)
    return jax.tree.unflatten(structures[0], out)


def _over_rows(function: Any, rows: tuple[bool, ...], operands: Sequence[Any]) -> list[Any]:
    """`over_rows` of arrays."""
    for array, has in zip(operands, rows, strict=True):
        own = jax.typeof(array).sharding
        if has and AxisType.Explicit in own.mesh.axis_types and own.spec[0] is not None:
            each, one = PartitionSpec(own.spec[0]), PartitionSpec()
            specs = tuple(each if has else one for has in rows)
            mapped = jax.shard_map(function, mesh=own.mesh, in_specs=specs, out_specs=each)
            return mapped(*operands)
    return rows_p.bind(*operands, function=function, has_rows=rows)


def row_factors(ndim: int, rows: bool) -> Axes:
    """The factors of an array's axes, of which the first may be the rows."""
    return ("rows" if rows else None, *[None] * (ndim - 1)) if ndim else ()


def _axes(operands: Sequence[Any]) -> tuple[AxisType, ...]:
    return mesh_of([jax.typeof(x) for x in operands]).axis_types


@rows_p.def_impl
def _impl(*operands: Any, function: Any, has_rows: tuple[bool, ...]) -> list[Any]:
    del has_rows
    return function(*operands)


@rows_p.def_abstract_eval
def _abstract_eval(*operands: Any, function: Any, has_rows: tuple[bool, ...]) -> list[Any]:
    del has_rows
    return results(jax.eval_shape(function, *operands), operands)


def _batch(
    operands: Sequence[Any], axes: Sequence[Any], *, function: Any, has_rows: tuple[bool, ...]
) -> tuple[list[Any], list[int]]:
    """Other rows outside, which are divided instead: by the function's own rules, or here."""
    del has_rows
    mapped = jax.vmap(function, in_axes=tuple(axes))
    if AxisType.Explicit in _axes(operands):
        rows = tuple(axis is not None for axis in axes)
        mapped = jax.vmap(function, in_axes=tuple(0 if has else None for has in rows))
        operands = [
            x if axis is None else jnp.moveaxis(x, axis, 0)
            for x, axis in zip(operands, axes, strict=True)
        ]
        out = _over_rows(jax.jit(mapped), rows, operands)
    else:
        out = mapped(*operands)
    return out, [0] * len(out)


primitive_batchers[rows_p] = _batch


def _lower(
    ctx: LoweringRuleContext, *operands: Any, function: Any, has_rows: tuple[bool, ...]
) -> Any:
    if AxisType.Explicit in mesh_of(ctx.avals_in).axis_types:  # the rows are not divided
        return lower_fun(function, multiple_results=True)(ctx, *operands)

    avals: list[Any] = list(ctx.avals_in)

    given = [row_factors(aval.ndim, rows) for aval, rows in zip(avals, has_rows, strict=True)]
    made = [row_factors(aval.ndim, True) for aval in ctx.avals_out]

    def part(held: Registrations, mesh: Any, axes: Any) -> Any:
        parts = {f: count(mesh, names) for f, names in axes.items()}
        specs = [
            jax.ShapeDtypeStruct(divided(aval.shape, own, parts), aval.dtype)
            for aval, own in zip(avals, given, strict=True)
        ]
        for plan in _plans(jax.make_jaxpr(function)(*specs).jaxpr):
            held.add(plan)
        return function

    return lower_partitioned(ctx, operands, function, given, made, part)


register(rows_p, _lower)


def _plans(jaxpr: Any) -> Iterator[CallPlan]:
    """Those of all calls in a program."""
    for equation in jaxpr.eqns:
        if equation.primitive is call_p:
            yield equation.params["plan"]
        elif equation.primitive is tangent_p:
            yield tangent_plan(**equation.params)
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr"),
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _plans(inner)
