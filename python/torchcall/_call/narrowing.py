"""Narrowing: the model sees a prefix of padded axes."""

import dataclasses
from typing import Any, NamedTuple

import jax


class Axis(NamedTuple):
    """The axis of an operand or output that a length narrows. An output's must be 0."""

    length: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Narrowing:
    """How many entries of padded axes the model sees.

    A length is an int32 scalar operand that the handler reads, so on the CPU only.
    The model gets `max(length + extra, least)` entries of every axis that names it, and must return
    as many; the rest of an output is zero.

    Attributes:
        names: of the lengths, for errors.
        inputs: per leaf of `(args, kwargs)`, in JAX's order, the axis or None.
        outputs: a pytree prefix of the outputs, with an `Axis` or None at its leaves.
        extra: entries beyond the valid ones, the phantoms.
        least: the smallest number of entries that the model sees.
    """

    names: tuple[str, ...]
    inputs: tuple[Axis | None, ...]
    outputs: Any
    extra: int = 1
    least: int = 2

    def key(self) -> Any:
        """A hashable key, equal for calls that can use the same plan."""
        leaves, treedef = jax.tree.flatten(self.outputs, is_leaf=is_axis)
        return self.names, self.inputs, tuple(leaves), treedef, self.extra, self.least


def is_axis(value: object) -> bool:
    """Whether a value is a leaf of `Narrowing.outputs`."""
    return value is None or isinstance(value, Axis)
