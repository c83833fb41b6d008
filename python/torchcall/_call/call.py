"""One call, and what its engine adds to it."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import jax

from torchcall._call.narrowing import Narrowing
from torchcall._call.sharding import ShardingRule
from torchcall._call.specs import is_static
from torchcall._call.tree import Node


class IndexCheck(NamedTuple):
    """The allowed entries of an integer operand; see csrc/engine.h.

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


class CompiledDerivative(NamedTuple):
    """A vector-Jacobian product that an engine has as a program; see csrc/torch/package.h.

    The program takes the model's inputs and one cotangent per float output of the model, and
    returns the model's outputs and some gradients.

    Attributes:
        cotangents: per cotangent: the model's output, numbered among its results; the dtype; and
            the nodes of zeros of its form.
        gradients: per gradient, the operand.
        no_more: why the product itself cannot be differentiated, and what to do.
    """

    cotangents: list[tuple[int, str, list[Node]]]
    gradients: list[int]
    no_more: str


@dataclasses.dataclass(frozen=True)
class CallOptions:
    """Internal options of a call, which `torchcall.mliap` uses.

    Attributes:
        outputs: a pytree of `jax.ShapeDtypeStruct`, the outputs that the caller wants. Further keys
            of the model's dicts are dropped, and floats are cast. None: as the wrapper's
            `output_spec` says.
        narrowing: the padded axes of which the model sees a prefix, if any.
        index_checks: range checks of integer operands, numbered among the arrays in JAX's order.
            Calls on a CPU make them before the model runs; on a GPU, that would mean waiting.
        reuses_last: whether a call on a CPU with the operands of the call before, in the same
            execution of a program, returns its results instead of running the model.
        gradient_of: per output, the operand (an array, in JAX's order) by which it is the gradient
            of one function of the operands, in increasing order; empty if that is not known. The
            outputs' Jacobian is then symmetric, which makes their tangents cheaper.
        has_parameters: whether the first argument is not the model's, but its parameters by name.
    """

    outputs: Any = None
    narrowing: Narrowing | None = None
    index_checks: tuple[IndexCheck, ...] = ()
    reuses_last: bool = False
    gradient_of: tuple[int, ...] = ()
    has_parameters: bool = False

    def key(self) -> Any:
        """A hashable key, equal for calls that can use the same plan."""
        leaves, treedef = jax.tree.flatten(self.outputs)
        outputs = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        narrowing = None if self.narrowing is None else self.narrowing.key()
        return (
            outputs,
            treedef,
            narrowing,
            self.index_checks,
            self.reuses_last,
            self.gradient_of,
            self.has_parameters,
        )


@dataclasses.dataclass(frozen=True)
class Call:
    """One call as it is traced: its arguments, and the options that apply to it.

    Attributes:
        treedef: the structure of `(args, kwargs)`, None counting as a leaf.
        specs: per leaf: its `jax.ShapeDtypeStruct`, or the static Python value itself.
        names: per leaf, as errors name it.
        casts: per leaf: NumPy's name of the dtype that the model gets, or None.
        output_spec: the wrapper's option.
        requires_grad: whether the model may differentiate inside.
        cuda_graph: the wrapper's option.
        threads: the wrapper's option.
        vmap_method: the wrapper's option.
        sharding_rule: the wrapper's option.
        options: internal options.
    """

    treedef: Any
    specs: list[Any]
    names: list[str]
    casts: list[str | None]
    output_spec: Any
    requires_grad: bool
    cuda_graph: str
    threads: int | str | None
    vmap_method: str
    sharding_rule: ShardingRule | None
    options: CallOptions

    @property
    def selects_outputs(self) -> bool:
        """Whether the caller wants only some of the outputs."""
        return self.options.outputs is not None

    def cast_arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` as specs, after the casts."""
        return jax.tree.unflatten(
            self.treedef,
            [
                spec
                if is_static(spec) or cast is None
                else jax.ShapeDtypeStruct(spec.shape, jax.numpy.dtype(cast))
                for spec, cast in zip(self.specs, self.casts, strict=True)
            ],
        )

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` as specs, before the casts."""
        return jax.tree.unflatten(self.treedef, self.specs)

    @property
    def arrays(self) -> list[int]:
        """Which leaves are arrays, the operands."""
        return [i for i, spec in enumerate(self.specs) if not is_static(spec)]


class EngineCall(Protocol):
    """An engine's part of a call.

    Attributes:
        arguments: the model's arguments, a tuple (positional) and a dict (keywords) in preorder.
        copies: per operand, whether the model always gets a private copy.
        index_checks: checks that the model itself requires.
        parameters: see `PlanSpec`.
        device: "cpu" or "cuda" for code that runs there alone, else None.
        no_derivatives: why the engine cannot differentiate, and what to do, or "".
        derivative: what an engine that cannot differentiate has instead, or None.
    """

    arguments: list[Node]
    copies: list[bool]
    index_checks: list[IndexCheck]
    parameters: list[list[str]]
    device: str | None
    no_derivatives: str
    derivative: CompiledDerivative | None

    def infer_outputs(self, change: Callable[[Any], Any] | None = None) -> Any:
        """Returns the model's outputs as a pytree of `jax.ShapeDtypeStruct`, without running it.

        Args:
            change: makes another function of the model, which is traced instead.

        Raises:
            ValueError: they cannot be inferred; the message says what to do.
        """
        ...

    def results(self, outputs: Any) -> list[Node]:
        """Returns the structure of the model's result for these outputs, in preorder.

        Raises:
            ValueError, TypeError: the model cannot return these outputs.
        """
        ...

    def eager_runner(self, outputs: Any, n_lengths: int) -> Any:
        """Returns the `EagerRunner` of an eager model, None for other engines."""
        ...
