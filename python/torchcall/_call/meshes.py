"""Calls inside `shard_map` and under explicit shardings: types of operands and results.

JAX tracks over which axes of a mesh a value varies. A primitive's operands must vary over the same
axes, and its results vary over them too. The attributes are read here only.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from torchcall._call.sharding import Axes
from torchcall._undocumented.of_jax import ShapedArray


def _varying(x: Any) -> frozenset[Any]:
    """The axes over which a value varies, as far as `shard_map` checks them."""
    if hasattr(x, "manual_axis_type"):
        return getattr(x.manual_axis_type, "varying", frozenset())
    return getattr(x, "vma", frozenset())  # older versions of JAX


def aligned(operands: Sequence[Any]) -> list[Any]:
    """The operands, varying over the same axes."""
    types = [jax.typeof(x) for x in operands]
    axes = frozenset[Any]().union(*map(_varying, types))
    if not axes:
        return list(operands)
    return [
        _made_varying(x, tuple(axes - _varying(kind)))
        for x, kind in zip(operands, types, strict=True)
    ]


def _made_varying(x: Any, axes: tuple[Any, ...]) -> Any:
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    older: Any = jax.lax
    return older.pvary(x, axes)


def results(
    specs: Sequence[jax.ShapeDtypeStruct],
    operands: Sequence[Any],
    given: Sequence[Axes] = (),
    made: Sequence[Axes] = (),
) -> list[ShapedArray]:
    """The types of a call's results, from those of its operands.

    Args:
        specs: shapes and dtypes of the results.
        operands: types of the operands.
        given: per operand, the factors of its axes. Without them, results are not sharded.
        made: per result, the factors of its axes.
    """
    mesh = mesh_of(operands)
    if mesh.empty:
        return [ShapedArray(spec.shape, spec.dtype) for spec in specs]
    more: dict[str, Any] = {}
    varying = [x for x in operands if _varying(x)]
    if varying:
        name = "manual_axis_type" if hasattr(varying[0], "manual_axis_type") else "vma"
        more[name] = getattr(varying[0], name)
    axes = axes_of_factors(given, operands) if given else {}
    shardings = [
        NamedSharding(mesh, partition_spec(axes, factors))
        for factors in (made or [()] * len(specs))
    ]
    return [
        ShapedArray(spec.shape, spec.dtype, sharding=sharding, **more)
        for spec, sharding in zip(specs, shardings, strict=True)
    ]


def mesh_of(operands: Sequence[Any]) -> Any:
    """The mesh of the context, or that of the operands: their shardings have one without it."""
    mesh = jax.sharding.get_abstract_mesh()
    own = (x.sharding.mesh for x in operands if mesh.empty and not x.sharding.mesh.empty)
    return next(own, mesh)


def axes_of_factors(factors: Sequence[Axes], arrays: Sequence[Any]) -> dict[str, tuple[str, ...]]:
    """The mesh's axes along which each factor is divided, by the first array that is.

    Args:
        factors: per array, the factors of its axes.
        arrays: with a shape and a `NamedSharding`.
    """
    axes: dict[str, tuple[str, ...]] = {}
    used: set[str] = set()
    for own, array in zip(factors, arrays, strict=True):
        sharding = array.sharding
        for factor, size, names in zip(own, array.shape, sharding.spec, strict=False):
            if factor is None or names is None or factor in axes:
                continue
            names = (names,) if isinstance(names, str) else tuple(names)
            parts = count(sharding.mesh, names)
            if parts > 1 and used.isdisjoint(names) and size > 0 and size % parts == 0:
                axes[factor] = names
                used.update(names)
    return axes


def count(mesh: Any, names: Sequence[str]) -> int:
    """The number of devices along axes of a mesh."""
    return math.prod(mesh.shape[name] for name in names)


def partition_spec(axes: Mapping[str, tuple[str, ...]], factors: Axes) -> PartitionSpec:
    """How an array is sharded whose axes have these factors."""
    return PartitionSpec(*(None if factor is None else axes.get(factor) for factor in factors))


def whole(tree: Any) -> Any:
    """The arrays of a pytree, gathered where they are sharded over explicit axes of a mesh."""

    def gathered(x: Any) -> Any:
        if not isinstance(x, jax.Array):
            return x
        own = jax.typeof(x).sharding
        mesh = own.mesh
        if mesh.empty or AxisType.Explicit not in mesh.axis_types or not any(own.spec):
            return x
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))

    return jax.tree.map(gathered, tree)


def resharded(value: Any, to: ShapedArray) -> Any:
    """A value as the type of a result has it, where a mesh has explicit axes."""
    mesh = to.sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return value
    return jax.sharding.reshard(value, to.sharding)
