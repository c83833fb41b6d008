"""Plans: everything about one call that is known when the JAX program is traced."""

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from torchcall import _bridge
from torchcall._call.call import CompiledDerivative, IndexCheck
from torchcall._call.content import content_of
from torchcall._call.narrowing import Axis
from torchcall._call.sharding import Sharding
from torchcall._call.specs import is_symbolic
from torchcall._call.tree import Node

# Plans that a wrapper remembers, and derived ones that a plan does. Programs hold what they use.
MOST_PLANS = 256


class Operand(NamedTuple):
    """An array that XLA passes in; the fields are those of an entry of `PlanSpec.operands`."""

    name: str
    dtype: str
    shape: list[int]
    cast: str | None = None
    narrow: Axis | None = None
    copied: bool = False


class PlanSpec(NamedTuple):
    """What the native plan needs to know: `TcPlanSpec` of csrc/engine.h, in Python's types.

    Attributes:
        operands: the arrays that XLA passes in, lengths last.
        outputs: the arrays that the model returns, in the same form.
        lengths: (operand, extra, least) of each length.
        arguments, results: the pytrees that the model takes and returns, in preorder.
        selects_outputs: whether dicts may have further keys, and floats are cast.
        index_checks: range checks of integer operands.
        parameters: per operand that is a parameter of the module, its names. These are the first
            operands, and no arguments of the model.
        eager_runner: what runs an eager model, or None.
        cuda_graph: the wrapper's option.
        graph_refusal: why calls cannot be replays of a CUDA graph, or "".
        threads: the wrapper's option: torch's threads in a call, None or "auto".
        reuses_last: see `CallOptions`.
        loops: the mapped axes, outermost first: the size, and per operand whether it has this axis
            before those of its `shape`. Outputs have all of them. One call per element.
        derivatives: (inputs, outputs, keeps_outputs) of each vector-Jacobian product,
            `TcDerivative`, in the order in which they are applied.
        vmap_method: the wrapper's option.
        no_derivatives: why the engine cannot differentiate, and what to do, or "".
        gradient_of: see `CallOptions`; empty for derivatives.
        derivative: what an engine that cannot differentiate has instead, or None.
    """

    operands: list[Operand]
    outputs: list[Operand]
    lengths: list[tuple[int, int, int]]
    arguments: list[Node]
    results: list[Node]
    selects_outputs: bool
    index_checks: list[IndexCheck]
    parameters: list[list[str]]
    eager_runner: Any
    cuda_graph: str
    graph_refusal: str
    threads: int | str | None
    reuses_last: bool
    loops: list[tuple[int, list[bool]]]
    derivatives: list[tuple[list[int], list[int], bool]]
    vmap_method: str
    no_derivatives: str
    gradient_of: tuple[int, ...]
    derivative: CompiledDerivative | None


class CallPlan:
    """One plan. It lives as long as this object or an executable needs it.

    Compared by identity. It does not refer to its wrapper, so a cached program does not retain the
    wrapper.

    Attributes:
        model_name: what errors call the model.
        model: the native model.
        device: "cpu" or "cuda" for a package, which runs there alone, else None.
        is_symbolic: whether a size is symbolic, as `jax.export` has them. There is no native plan
            then.
        requires_graph: whether a call must be a replay of a CUDA graph.
        operand_dtypes: dtype of each operand.
        outputs: shape and dtype of each output.
        operand_shapes: shape of each operand, by name.
        spec: what the native plan needs.
        sharding: what programs for several devices need, if the wrapper has a rule.
        threads: torch's threads in a call, 0: the process's budget.
        thread_times: seconds per call by number of threads, as warm-up measured them last; None if
            it never did.

    Args:
        model: the native model.
        model_name: as above.
        spec: what the native plan needs.
        device: as above.
        compiled: makes the jitted function that runs a plan outside any program.
        sharding: as above.
    """

    def __init__(
        self,
        model: _bridge.Model,
        model_name: str,
        spec: PlanSpec,
        device: str | None,
        compiled: "Callable[[CallPlan], Callable[..., Any]]",
        sharding: Sharding | None = None,
    ) -> None:
        described = spec._replace(eager_runner=None)  # its address differs between processes
        self._description = repr((tuple(described), model.options))
        self._live_model = (model_name, model.fingerprint)
        self._registration: Callable[[], Registration | None] = lambda: None
        self.model_name = model_name
        self.device = device
        self.requires_graph = spec.cuda_graph == "require"
        self.operand_dtypes = [jnp.dtype(operand.dtype) for operand in spec.operands]
        mapped = tuple(size for size, _ in spec.loops)
        self.outputs = [
            jax.ShapeDtypeStruct((*mapped, *output.shape), jnp.dtype(output.dtype))
            for output in spec.outputs
        ]
        self.operand_shapes = {operand.name: tuple(operand.shape) for operand in spec.operands}
        self.is_symbolic = any(
            is_symbolic(size)
            for sizes in (
                mapped,
                *(array.shape for array in (*spec.operands, *spec.outputs)),
            )
            for size in sizes
        )
        self.model = model
        self._native = None if self.is_symbolic else _bridge.NativePlan(model, model_name, spec)
        self.threads = 0
        self.thread_times: dict[int, float] | None = None
        if isinstance(spec.threads, int):
            self.set_threads(spec.threads)
        self.spec = spec
        self.sharding = sharding
        self._derived: OrderedDict[Any, tuple[CallPlan, Callable[..., Any]]] = OrderedDict()
        self._compiled = compiled
        self._eager: Callable[[], Callable[..., Any] | None] = lambda: None

    def set_eager(self, compiled: Callable[..., Any]) -> None:
        """Sets the jitted function that runs this plan outside any program.

        The reference is weak, because the caches of a compiled function hold the plan.
        """
        self._eager = weakref.ref(compiled)

    def derived(
        self,
        key: Any,
        change: Callable[[PlanSpec], PlanSpec],
        sharding: Callable[[Sharding], Sharding],
        model_name: str | None = None,
    ) -> "CallPlan":
        """A plan of the same model, which this one remembers.

        Args:
            key: equal for equal changes.
            change: makes its specification from this one's.
            sharding: makes its `sharding` from this one's.
            model_name: what its errors call the model; None: as this one's.
        """
        found = self._derived.get(key)
        if found is None:
            made = CallPlan(
                self.model,
                model_name or self.model_name,
                change(self.spec),
                self.device,
                self._compiled,
                None if self.sharding is None else sharding(self.sharding),
            )
            made.set_threads(self.threads)
            run = self._compiled(made)
            made.set_eager(run)
            found = self._derived.setdefault(key, (made, run))
            if len(self._derived) > MOST_PLANS:
                self._derived.popitem(last=False)
        return found[0]

    def __call__(self, *operands: Any) -> Any:
        """Runs the plan on concrete arrays.

        JAX's caches refer to callable parameters of a primitive weakly, and retain all others. So a
        plan is callable.
        """
        run = self._eager()
        if run is None:  # its wrapper is gone, but a program still uses the plan
            run = self._compiled(self)
        return run(*operands)

    def set_threads(self, threads: int) -> None:
        """Sets torch's threads in later calls, also those of compiled programs."""
        self.threads = threads
        if self._native is not None:
            self._native.set_threads(threads)

    @property
    def native(self) -> _bridge.NativePlan:
        """The native plan.

        Raises:
            ValueError: a size is symbolic.
        """
        if self._native is None:
            raise ValueError(
                f"torchcall: {self.model_name}: expected sizes that are numbers, got symbolic "
                "ones, which only jax.export takes"
            )
        return self._native

    @property
    def has_file(self) -> bool:
        """Whether the model was loaded from a file."""
        return self.model.file is not None

    def content(self) -> str:
        """Digest of the model's code and weights as they are now, "" over live weights."""
        return content_of(self.model)

    def register(self) -> "Registration":
        """Registers the plan for a program being lowered, which must hold the result."""
        content = self.content()
        registration = self._registration()
        if registration is None or registration.content != content:
            model = content or self._live_model
            text = repr((model, self._description)).encode()
            digest = hashlib.blake2b(text, digest_size=8).digest()
            plan_id = int.from_bytes(digest, "big") >> 1
            registration = Registration(self, plan_id, content)
            self._registration = weakref.ref(registration)
        return registration

    def __repr__(self) -> str:
        order = len(self.spec.derivatives)
        derivative = f", derivative of order {order}" if order else ""
        mapped = "".join(f", {size} calls" for size, _ in self.spec.loops)
        return f"CallPlan({self.model_name}{derivative}{mapped})"


def no_content(plan: CallPlan, what: str) -> Exception:
    """Why a plan, whose model has no digest now, cannot be part of what outlives the process.

    Args:
        plan: the plan.
        what: what cannot be done.
    """
    start = f"torchcall: {plan.model_name}: cannot {what}: expected"
    if plan.has_file:
        return ValueError(
            f"{start} the file that was loaded first, got one that changed since; call refresh() "
            "and compile the program again"
        )
    if plan.spec.eager_runner is not None:
        return TypeError(
            f"{start} a model with code and weights of its own, got an eager one; compile it with "
            "torchcall.compile, or save torch.jit.script of it to a file, and wrap the path"
        )
    return TypeError(
        f"{start} fixed weights, got live weights; save the module to a file and wrap the path, or "
        "pass freeze=True (TorchScript)"
    )


class Registration:
    """A plan as a lowered program names it, registered for as long as this object lives.

    Attributes:
        plan: the plan.
        id: a hash of what the plan does. It includes the model's content where that is known.
        ordinal: distinguishes registered plans of the same id.
        content: digest of the model's code and weights at lowering, "" over live weights.
    """

    def __init__(self, plan: CallPlan, plan_id: int, content: str) -> None:
        self.plan = plan
        self.id = plan_id
        self.content = content
        self._native = _bridge.NativeRegistration(plan.native, plan_id)
        self.ordinal = self._native.ordinal
        _registrations[plan_id] = self

    @property
    def is_current(self) -> bool:
        """Whether the model still has the weights for which the program was lowered."""
        return self.content == self.plan.content()

    def __reduce__(self) -> Any:
        # An executable is being serialised. It names its model by content alone.
        name = self.plan.model_name
        if not self.content:
            raise no_content(self.plan, "serialise a program")
        if not self.is_current:
            raise ValueError(
                f"torchcall: {name}: cannot serialise a program: expected the weights that it was "
                "compiled for, got others: refresh() replaced them; make a new wrapper and compile "
                "the program again"
            )
        return _restore, (name, self.id)


_registrations: weakref.WeakValueDictionary[int, Registration] = weakref.WeakValueDictionary()


def _restore(name: str, plan_id: int) -> Registration:
    """The registration of a plan that a serialised executable names.

    Raises:
        ValueError: this process has no model of the same content, called in the same way.
    """
    registration = _registrations.get(plan_id)
    if registration is None or not registration.is_current:
        raise ValueError(
            f"torchcall: {name}: cannot load a program: expected this model in this process, with "
            "the same weights and arguments, got none; wrap the same file and call the wrapper "
            "once on arguments of the same shapes before the program is loaded"
        )
    return registration
