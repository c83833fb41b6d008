"""Programs in which the devices divide a call among themselves, by the wrapper's sharding rule.

XLA's partitioner asks for the program of one device when it has settled how each array is sharded.
Inside `shard_map` a call is of one device already.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torchcall._call.meshes import axes_of_factors, count, partition_spec, resharded
from torchcall._call.plan import CallPlan
from torchcall._call.primitive import call_p, sharded_p
from torchcall._call.sharding import Axes, Sharding, in_jax
from torchcall._undocumented import of_jax
from torchcall._undocumented.of_jax import LoweringRuleContext, lower_fun, register_lowering


class Registrations(list[Any]):
    """The registered plans of the parts, which a program holds like that of a whole call."""

    def __init__(self) -> None:
        super().__init__()
        self.divided = False
        self._name = ""

    def add(self, plan: CallPlan) -> None:
        """Registers a part's plan."""
        self.append(plan.register())
        self._name = plan.model_name

    def __reduce__(self) -> Any:
        if not self.divided:
            return list, (list(self),)
        raise TypeError(
            f"torchcall: {self._name}: cannot serialise a program whose devices divide calls among "
            "themselves; call the model inside jax.shard_map, or without sharding_rule"
        )


def lower_partitioned(
    ctx: LoweringRuleContext,
    operands: Sequence[Any],
    whole: Callable[..., list[Any]],
    given: Sequence[Axes],
    made: Sequence[Axes],
    part: Callable[[Registrations, Mesh, Mapping[str, tuple[str, ...]]], Any],
) -> Any:
    """Lowers a call that the devices of a program can divide among themselves.

    Args:
        ctx, operands: as for lowering rules.
        whole: the call, undivided.
        given: per operand, the factors of its axes.
        made: per result, the factors of its axes.
        part: makes the call of one device, from the mesh's axes along which factors are divided.
    """
    if of_jax.is_for_export(ctx):
        return lower_fun(whole, multiple_results=True)(ctx, *operands)
    held = Registrations()
    of_jax.add_keepalive(ctx, held)

    def partition(mesh: Any, args: Any, results: Any) -> Any:
        mesh, axes = _axes_of_factors(mesh, [*made, *given], [*results, *args])
        held.divided |= bool(axes)
        lower = part(held, mesh, axes)
        specs = [NamedSharding(mesh, partition_spec(axes, factors)) for factors in (*made, *given)]
        return mesh, lower, specs[: len(made)], tuple(specs[len(made) :])

    def infer(mesh: Any, args: Any, results: Any) -> Any:
        del results
        mesh, axes = _axes_of_factors(mesh, given, args)
        return [NamedSharding(mesh, partition_spec(axes, factors)) for factors in made]

    def torchcall(*operands: Any) -> list[Any]:
        return list(whole(*operands))

    call = custom_partitioning(torchcall)
    call.def_partition(
        partition,
        infer_sharding_from_operands=infer,
        sharding_rule=in_jax(given, made),
        decode_shardings=False,  # see _named
    )

    def lowered(*given: Any) -> list[Any]:
        values = call(*given)
        return [resharded(v, aval) for v, aval in zip(values, ctx.avals_out, strict=True)]

    return lower_fun(lowered, multiple_results=True)(ctx, *operands)


def _lower(ctx: LoweringRuleContext, *operands: Any, plan: CallPlan) -> Any:
    sharding = plan.sharding
    assert sharding is not None

    def whole(*given: Any) -> list[Any]:
        return call_p.bind(*given, plan=plan)

    return lower_partitioned(
        ctx,
        operands,
        whole,
        sharding.factors.all_operands(plan.spec.loops),
        sharding.factors.all_outputs(),
        partial(_part, plan, sharding),
    )


def register(primitive: of_jax.Primitive, rule: Callable[..., Any]) -> None:
    """Registers a rule that uses `lower_partitioned`."""
    register_lowering(primitive, rule)
    of_jax.require_devices(primitive)


register(sharded_p, _lower)


def _part(
    plan: CallPlan,
    sharding: Sharding,
    held: Registrations,
    mesh: Mesh,
    axes: Mapping[str, tuple[str, ...]],
) -> Any:
    """The program of one device."""
    shard = plan
    if axes:
        shard = sharding.shard({f: count(mesh, names) for f, names in axes.items()})
    held.add(shard)

    def lower(*operands: Any) -> list[Any]:
        values = call_p.bind(*operands, plan=shard)
        missing = [
            [name for f, names in axes.items() if f not in factors for name in names]
            for factors in sharding.factors.all_outputs()
        ]
        # A gradient by an operand that every part used.
        return [
            jax.lax.psum(value, tuple(names)) if names else value
            for value, names in zip(values, missing, strict=True)
        ]

    return lower


def _axes_of_factors(
    mesh: Mesh, factors: Sequence[Axes], arrays: Sequence[Any]
) -> tuple[Mesh, dict[str, tuple[str, ...]]]:
    """The mesh's axes along which each factor is divided; none for shardings without names."""
    if not mesh.empty:
        return mesh, axes_of_factors(factors, [_named(mesh, array) for array in arrays])
    devices = sorted(arrays[0].sharding.device_set, key=lambda device: device.id)
    return Mesh(devices, ("devices",)), {}


def _named(mesh: Mesh, array: Any) -> jax.ShapeDtypeStruct:
    """The array with XLA's sharding by names of the mesh; whole where it has no names."""
    try:
        spec = of_jax.partition_spec(array, mesh)
    except Exception:
        spec = PartitionSpec()
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, spec))
