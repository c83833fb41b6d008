"""A call as the engines see it, and what an engine settles for its plan."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import jax

from torchcall._call.specs import is_static
from torchcall._call.tree import Node


class IndexCheck(NamedTuple):
    """Which entries an operand of integers may have; see csrc/engine.h.

    Attributes:
        operand: the operand.
        rows_of: the operand whose rows the entries number, or -1.
        allowed: where `rows_of` is -1, the set of allowed entries, as bits 0 to 127.
    """

    operand: int
    rows_of: int
    allowed: tuple[int, int] = (0, 0)

    @classmethod
    def members(cls, operand: int, entries: Iterable[int]) -> "IndexCheck":
        """The check that every entry is one of these numbers from 0 to 127."""
        bits = sum(1 << entry for entry in set(entries))
        return cls(operand, -1, (bits & (2**64 - 1), bits >> 64))


@dataclasses.dataclass(frozen=True)
class Call:
    """What is known of a call before its outputs are.

    Attributes:
        treedef: the structure of `(args, kwargs)`, None counting as a leaf.
        names: per leaf, as errors name it.
        specs: per leaf: its `jax.ShapeDtypeStruct`, or the static Python value itself.
        casts: per leaf: NumPy's name of the dtype that the model gets, or None.
        requires_grad: whether the model may differentiate inside.
        selects_outputs: whether only some of the outputs are asked for.
        outputs_known: whether the caller says what comes out.
    """

    treedef: Any
    names: list[str]
    specs: list[Any]
    casts: list[str | None]
    requires_grad: bool
    selects_outputs: bool
    outputs_known: bool

    def as_the_model_sees_it(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of specs after the casts."""
        return jax.tree.unflatten(
            self.treedef,
            [
                spec
                if is_static(spec) or cast is None
                else jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(cast))
                for spec, cast in zip(self.specs, self.casts, strict=True)
            ],
        )

    def as_given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of specs."""
        return jax.tree.unflatten(self.treedef, self.specs)

    @property
    def arrays(self) -> list[int]:
        """Which leaves are arrays, the operands."""
        return [i for i, spec in enumerate(self.specs) if not is_static(spec)]


class EngineCall(Protocol):
    """A call that an engine has looked at.

    Attributes:
        arguments: the model's arguments, a tuple (positional) and a dict (keywords) in preorder.
        copies: per operand, whether the model gets a private copy, for it may write to it.
        index_checks: what each call makes sure of before it runs code compiled ahead of time.
        device: "cpu" or "cuda" for code that runs there alone, else None.
    """

    arguments: list[Node]
    copies: list[bool]
    index_checks: list[IndexCheck]
    device: str | None

    def infer_outputs(self) -> Any:
        """The pytree of `jax.ShapeDtypeStruct` that the model returns, without running it.

        Raises:
            ValueError: it cannot be told; the message says what to do.
        """
        ...

    def results(self, outputs: Any) -> list[Node]:
        """What the model must return for these outputs, in preorder.

        Raises:
            ValueError, TypeError: the model cannot return such a thing.
        """
        ...

    def callable(self, outputs: Any, n_lengths: int) -> Any:
        """What runs a model that only Python can run (see `EagerRunner`), None for any other."""
        ...
