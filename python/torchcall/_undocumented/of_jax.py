"""Names of JAX: of private modules, `jax.extend` and `jax.interpreters`, and private attributes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from jax._src import checkify
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax._src.sharding_impls import parse_flatten_op_sharding
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters.ad import (
    Zero,
    deflinear2,
    is_undefined_primal,
    primitive_jvps,
    primitive_transposes,
)
from jax.interpreters.batching import primitive_batchers
from jax.interpreters.mlir import LoweringRuleContext, lower_fun, register_lowering
from jax.sharding import Mesh, PartitionSpec

__all__ = [
    "LoweringRuleContext",
    "Primitive",
    "ShapedArray",
    "Zero",
    "deflinear2",
    "is_undefined_primal",
    "lower_fun",
    "primitive_batchers",
    "primitive_jvps",
    "primitive_transposes",
    "register_lowering",
]


def add_keepalive(context: LoweringRuleContext, value: object) -> None:
    """Lets a program hold an object for as long as JAX may compile or run it."""
    context.module_context.add_keepalive(value)


def is_for_export(context: LoweringRuleContext) -> bool:
    """Whether `jax.export` lowers the program."""
    return context.module_context.lowering_parameters.for_export


def platforms(context: LoweringRuleContext) -> str:
    """The platforms of a program, for errors."""
    return ", ".join(context.module_context.platforms)


def require_devices(primitive: Primitive) -> None:
    """Lets the primitive's lowering rule know the devices, as JAX's own custom_partitioning."""
    prim_requires_devices_during_lowering.add(primitive)


def partition_spec(array: Any, mesh: Mesh) -> PartitionSpec:
    """How XLA shards an array, by names of the mesh.

    Raises:
        Exception: an assertion, or one of several errors, where it has no names. XLA can divide an
            axis of an array by a part of a mesh's axis, as after a reshape.
    """
    (spec,) = parse_flatten_op_sharding(array.sharding._hlo_sharding, mesh)
    return spec


def mark_as_primitive(function: Any) -> None:
    """Marks a function as JAX marks those of its own primitives.

    With jax_debug_nans, a NaN in the result of such a function is reported without running it again
    operation by operation.
    """
    function._apply_primitive = True


def check_nans(primitive: Primitive, name: Callable[..., str]) -> None:
    """Lets the float checks of `checkify` check a primitive's results, as those of JAX's own.

    Args:
        primitive: with several results.
        name: of its parameters: what the error calls it.
    """

    def rule(error: Any, enabled_errors: Any, *operands: Any, **params: Any) -> tuple[Any, Any]:
        values = primitive.bind(*operands, **params)
        named = SimpleNamespace(name=name(**params), multiple_results=True)
        return checkify.check_nans(named, error, enabled_errors, values), values

    checkify.error_checks[primitive] = rule


def is_constant(value: object) -> bool:
    """Whether a value is a constant of a traced function: JAX 0.8.1 has a type of its own."""
    return type(value).__module__ == "jax._src.literals"
