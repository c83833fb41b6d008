"""Call plans: everything about one call that is known when the JAX program is traced."""

import hashlib
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from torchcall import _bridge
from torchcall._call.call import IndexCheck
from torchcall._call.narrowing import Axis
from torchcall._call.tree import Node


class Operand(NamedTuple):
    """An array that XLA hands over: its name, cast and narrowing, and whether it is copied."""

    name: str
    spec: jax.ShapeDtypeStruct
    cast: str | None = None
    narrow: Axis | None = None
    copied: bool = False


class Output(NamedTuple):
    """An array that the model returns."""

    name: str
    spec: jax.ShapeDtypeStruct
    narrow: Axis | None = None


class PlanStructure(NamedTuple):
    """What a plan needs beside its operands and outputs; see `EngineCall` and csrc/engine.h."""

    lengths: Sequence[tuple[int, int, int]]
    arguments: list[Node]
    results: list[Node]
    selects_outputs: bool
    index_checks: list[IndexCheck]
    callable: Any
    cuda_graph: str
    graph_refusal: str
    device: str | None


class AbsentPlan(NamedTuple):
    """What stands for a plan in a pickled executable."""

    model_name: str


class CallPlan:
    """One plan, registered natively for as long as this object or an executable needs it.

    Compared by identity. It never refers to its wrapper, so a cached program does not keep the
    wrapper alive.

    Attributes:
        id: the integer that stands in the compiled program.
        model_name: what errors call the model.
        device: "cpu" or "cuda" for a package, which serves that alone, else None.
        requires_graph: whether a call must be a replay of a CUDA graph.
        operand_dtypes: dtype of each operand.
        outputs: shape and dtype of each output.
    """

    def __init__(
        self,
        model: _bridge.Model,
        model_name: str,
        inputs: Sequence[Operand],
        outputs: Sequence[Output],
        structure: PlanStructure,
    ) -> None:
        native_inputs = [
            (o.name, str(o.spec.dtype), list(o.spec.shape), o.cast, o.narrow, o.copied)
            for o in inputs
        ]
        native_outputs = [
            (o.name, str(o.spec.dtype), list(o.spec.shape), None, o.narrow, False) for o in outputs
        ]
        described = structure._replace(callable=None)  # its address says nothing
        text = repr((model_name, model.fingerprint, native_inputs, native_outputs, described))
        digest = hashlib.blake2b(text.encode(), digest_size=6).digest()
        self.model_name = model_name
        self.device = structure.device
        self.requires_graph = structure.cuda_graph == "require"
        self.operand_dtypes = [operand.spec.dtype for operand in inputs]
        self.outputs = [output.spec for output in outputs]
        self._native = _bridge.Plan(
            model,
            model_name,
            int.from_bytes(digest, "big"),
            native_inputs,
            native_outputs,
            *structure[:-1],
        )
        self.id = self._native.id
        self._eager: Callable[[], Callable[..., Any] | None] = lambda: None

    def set_eager(self, compiled: Callable[..., Any]) -> None:
        """Remembers, weakly, the jitted function that runs this plan outside any program.

        Weakly, for a compiled function's caches hold the plan.
        """
        self._eager = weakref.ref(compiled)

    def __call__(self, *operands: Any) -> Any:
        """Runs the plan on concrete arrays.

        That a plan is callable matters to JAX too: its caches hold a primitive's callable
        parameters weakly, and would keep any other alive.
        """
        run = self._eager()
        if run is None:  # its wrapper is gone; a program that still knows the plan runs it
            from torchcall._call.primitive import compiled

            run = compiled(self)
        return run(*operands)

    def __reduce__(self) -> Any:
        # A pickled executable leaves its plans behind. Where it is loaded, it finds the plan of the
        # same id, which a call of the same model makes there.
        return AbsentPlan, (self.model_name,)

    def __repr__(self) -> str:
        return f"CallPlan({self.model_name}, id={self.id})"
