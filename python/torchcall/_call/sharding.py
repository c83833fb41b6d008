"""Sharding rules: the axes of a call that devices may divide among themselves.

An axis that devices may divide has a *factor*, a name that other axes of the same size share. Each
device calls the model on its part of every axis of a factor.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from jax.experimental.custom_partitioning import (
    BATCHING,
    ArrayMapping,
    SdyShardingRule,
    custom_partitioning,
)

if TYPE_CHECKING:
    from torchcall._call.plan import CallPlan, Operand

Axes = tuple[str | None, ...]
"""The factor of each axis of an array; None: every device needs the whole axis."""


@dataclasses.dataclass(frozen=True)
class ShardingRule:
    """The option `sharding_rule`, for arrays of any number of axes.

    Attributes:
        text: the rule, for `repr` and errors.
        operands: per operand, the factor of each axis, None where it must stay whole. A first
            entry that starts with `BATCHING` stands for any number of leading axes.
        outputs: per output, as `operands`.
    """

    text: str
    operands: tuple[Axes, ...]
    outputs: tuple[Axes, ...]

    @classmethod
    def of(cls, rule: object) -> "ShardingRule | None":
        """Reads the option.

        Raises:
            TypeError, ValueError: it is not a rule.
        """
        if rule is None or isinstance(rule, ShardingRule):
            return rule
        if not isinstance(rule, str | SdyShardingRule):
            raise TypeError(
                "torchcall: sharding_rule: expected a string such as 'b i, j -> b', an "
                f"SdyShardingRule or None, got {type(rule).__name__}"
            )
        reader = custom_partitioning(lambda: None)
        try:
            reader.def_partition(lambda: None, sharding_rule=rule)
        except ValueError as error:
            raise ValueError(
                "torchcall: sharding_rule: expected a rule such as 'b i, j -> b', got "
                f"{rule!r}: {error}"
            ) from error
        found: Any = reader.sharding_rule
        special = {
            *found.reduction_factors,
            *found.need_replication_factors,
            *found.permutation_factors,
        }
        operands, outputs = (
            tuple(tuple(_factor(axis, special) for axis in axes) for axes in mappings)
            for mappings in (found.operand_mappings, found.result_mappings)
        )
        return cls(rule if isinstance(rule, str) else str(rule), operands, outputs)

    def __repr__(self) -> str:
        return repr(self.text)


def _factor(axis: Any, special: set[str]) -> str | None:
    return axis if isinstance(axis, str) and axis not in special else None


class Factors(NamedTuple):
    """The factors of a plan's axes, mapped axes apart.

    Attributes:
        operands: per operand, those of its `shape` in the plan's specification.
        outputs: per output, in the same way.
        loops: those of the mapped axes, outermost first.
    """

    operands: list[Axes]
    outputs: list[Axes]
    loops: list[str]

    @classmethod
    def of(
        cls, rule: ShardingRule, operands: "Sequence[Operand]", outputs: "Sequence[Operand]"
    ) -> "Factors":
        """The factors of a call. Only those that every output has can be divided.

        Raises:
            ValueError: the rule does not fit the arrays.
        """
        found = []
        for what, axes, arrays in (
            ("operands", rule.operands, operands),
            ("outputs", rule.outputs, outputs),
        ):
            if len(axes) != len(arrays) and not (axes == ((),) and not arrays):
                raise ValueError(
                    f"sharding_rule: expected {len(arrays)} {what}, one for each array, got "
                    f"{len(axes)} in {rule!r}"
                )
            found.append([_expanded(rule, *pair) for pair in zip(axes, arrays, strict=False)])
        sizes: dict[str, tuple[int, str]] = {}
        for axes, array in zip([*found[0], *found[1]], [*operands, *outputs], strict=True):
            for factor, size in zip(axes, array.shape, strict=True):
                if factor is None:
                    continue
                known, name = sizes.setdefault(factor, (size, array.name))
                if size != known:
                    raise ValueError(
                        f"sharding_rule: expected one size of {factor.lstrip('?')!r} in {rule!r}, "
                        f"got {known} in {name} and {size} in {array.name}"
                    )
        given = set().union(*found[0])
        shared = given.intersection(*found[1])
        # An array that has a factor twice would need other parts than those on the device.
        twice = {f for axes in [*found[0], *found[1]] for f in axes if axes.count(f) > 1}
        usable = shared - twice - {None}
        whole = [
            [tuple(f if f in usable else None for f in axes) for axes in side] for side in found
        ]
        return cls(whole[0], whole[1], [])

    def all_operands(self, loops: Sequence[tuple[int, list[bool]]]) -> list[Axes]:
        """Per operand, the factors of all its axes, mapped ones first.

        Args:
            loops: as in the plan's specification.
        """
        return [
            (*(f for f, (_, has) in zip(self.loops, loops, strict=True) if has[i]), *own)
            for i, own in enumerate(self.operands)
        ]

    def all_outputs(self) -> list[Axes]:
        """Per output, the factors of all its axes, mapped ones first."""
        return [(*self.loops, *own) for own in self.outputs]

    def of_gradients(
        self, inputs: Sequence[int], outputs: Sequence[int], *, keeps_outputs: bool
    ) -> "Factors":
        """Those of a vector-Jacobian product; see `vjp_plan`."""
        return Factors(
            [*self.operands, *(self.outputs[j] for j in outputs)],
            [*(self.outputs if keeps_outputs else ()), *(self.operands[i] for i in inputs)],
            self.loops,
        )

    def with_loop(self, factor: str) -> "Factors":
        """Those with one more mapped axis, the outermost."""
        return self._replace(loops=[factor, *self.loops])

    def new_factor(self) -> str:
        """A name for one more mapped axis, which no rule can contain."""
        used = {f for axes in [*self.operands, *self.outputs, self.loops] for f in axes}
        return next(name for k in range(len(used) + 1) if (name := f"?vmap_{k}") not in used)


def _expanded(rule: ShardingRule, axes: Axes, array: "Operand") -> Axes:
    """The factors of an array's axes, those of an ellipsis numbered from the first."""
    group = axes[0] if axes and axes[0] is not None and axes[0].startswith(BATCHING) else None
    own = axes if group is None else axes[1:]
    more = len(array.shape) - len(own)
    if more < 0 or (more > 0 and group is None):
        raise ValueError(
            f"sharding_rule: {array.name}: expected {len(array.shape)} axes, got "
            f"{len(own)} in {rule!r}"
        )
    return (*(f"?{group}_{k}" for k in range(more)), *own)


class Sharding:
    """What a plan with a sharding rule needs in order to run on several devices.

    Args:
        factors: those of the plan.
        make: makes the plan of one device's part, from the number of parts of each factor that is
            divided. That plan has no rule.
    """

    def __init__(self, factors: Factors, make: "Callable[[Mapping[str, int]], CallPlan]") -> None:
        self.factors = factors
        self._make = make
        self._made: dict[Any, CallPlan] = {}

    def shard(self, parts: Mapping[str, int]) -> "CallPlan":
        """The plan of one device's part, made once."""
        key = tuple(sorted(parts.items()))
        if key not in self._made:
            self._made.setdefault(key, self._make(parts))
        return self._made[key]

    def derived(
        self, factors: Factors, change: "Callable[[CallPlan, Mapping[str, int]], CallPlan]"
    ) -> "Sharding":
        """That of a plan which is made from this one's.

        Args:
            factors: those of the new plan.
            change: makes the new plan's part from this plan's, and the numbers of parts.
        """
        own = {f for axes in [*self.factors.operands, self.factors.loops] for f in axes}
        return Sharding(
            factors,
            lambda parts: change(self.shard({f: n for f, n in parts.items() if f in own}), parts),
        )


def divided(shape: Sequence[int], axes: Axes, parts: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of one device's part of an array."""
    return tuple(
        size // parts.get(f, 1) if f is not None else size
        for size, f in zip(shape, axes, strict=True)
    )


def in_jax(operands: Sequence[Axes], outputs: Sequence[Axes]) -> SdyShardingRule:
    """The rule as JAX takes it."""
    names: dict[str, str] = {}
    whole: list[str] = []

    def name(factor: str | None) -> str:
        if factor is None:
            whole.append(f"w{len(whole)}")
            return whole[-1]
        return names.setdefault(factor, f"f{len(names)}")

    mappings = [
        tuple(ArrayMapping(*(name(factor) for factor in axes)) for axes in side)
        for side in (operands, outputs)
    ]
    return SdyShardingRule(mappings[0], mappings[1], need_replication_factors=tuple(whole))
