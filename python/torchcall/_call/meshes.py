"""Calls inside `shard_map` and under explicit shardings: types of operands and results.

JAX tracks over which axes of a mesh a value varies. A primitive's operands must vary over the same
axes, and its results vary over them too. The attributes are read here only.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray
from jax.sharding import NamedSharding, PartitionSpec


def _varying(x: Any) -> frozenset[Any]:
    """The axes over which a value varies, as far as `shard_map` checks them."""
    return getattr(getattr(x, "manual_axis_type", None), "varying", frozenset())


def aligned(operands: Sequence[Any]) -> list[Any]:
    """The operands, varying over the same axes."""
    types = [jax.typeof(x) for x in operands]
    axes = frozenset[Any]().union(*map(_varying, types))
    if not axes:
        return list(operands)
    return [
        jax.lax.pcast(x, tuple(axes - _varying(kind)), to="varying")
        for x, kind in zip(operands, types, strict=True)
    ]


def results(specs: Sequence[jax.ShapeDtypeStruct], operands: Sequence[Any]) -> list[ShapedArray]:
    """The types of a call's results, from those of its operands. Results are not sharded."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return [ShapedArray(spec.shape, spec.dtype) for spec in specs]
    more: dict[str, Any] = {"sharding": NamedSharding(mesh, PartitionSpec())}
    varying = [x for x in operands if _varying(x)]
    if varying:
        more["manual_axis_type"] = varying[0].manual_axis_type
    return [ShapedArray(spec.shape, spec.dtype, **more) for spec in specs]
