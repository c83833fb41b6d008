"""`TorchModuleWrapper`: a PyTorch model as a function of JAX programs."""

import os
import textwrap
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import torch

from torchcall._call.call import CallOptions
from torchcall._call.content import replace
from torchcall._call.derive import check_vmap_method
from torchcall._call.exported import Model
from torchcall._call.plan import MOST_PLANS, CallPlan
from torchcall._call.planning import Prepared, describe_call, leaf_specs, plan_key, prepare
from torchcall._call.primitive import bind
from torchcall._call.sharding import ShardingRule
from torchcall._call.specs import any_traced, is_static
from torchcall._call.threads import measured_threads, warm_up
from torchcall._call.tree import check_keys
from torchcall._engines import check_sizes, source_of, unpickle
from torchcall._engines.archive import PickledModelError
from torchcall._loaded import _bridge
from torchcall._threads import checked_threads

_NO_OPTIONS = CallOptions()


class TorchModuleWrapper:
    """Calls a torch model from JAX: `y = f(*args, **kwargs)`, eagerly or in a jitted program.

    Arguments are pytrees (dict, list, tuple, named tuple) of arrays and Python scalars, results are
    pytrees of arrays. TorchScript modules and AOTInductor packages get XLA's buffers without a copy
    and run without Python and without the GIL. Outputs are copied once.

    Args:
        module: a `torch.jit.ScriptModule`, a script function, or the path of a TorchScript archive;
            the path of an AOTInductor package (`.pt2`); or a `torch.nn.Module` or any callable on
            tensors, which each call runs in Python, under the GIL, on copies of its inputs. Such a
            callable is traced once with fake tensors if its outputs are not known. It must not call
            JAX.
            The caller's module is not changed and shares its weights with the calls. Calls on
            another device use a copy of the weights.
        requires_grad: True for a module that calls `torch.autograd.grad` inside its `forward`.
        input_spec: a pytree prefix of `(args, kwargs)` whose leaves are `torch.dtype`s to cast to
            inside torch, or None. JAX without x64 cannot make the int64 indices that models need.
        output_spec: a pytree of `jax.ShapeDtypeStruct`, or a function from the inputs' specs to the
            outputs'. Without it, the outputs are inferred with fake tensors, or read from the
            package. A package that `torchcall.compile` did not make needs it.
        freeze: whether to inline the weights into a private copy of the code (`torch.jit.freeze`);
            only for a TorchScript module in eval mode.
        vmap_method: how `jax.vmap` of a call works, always as one custom call. "sequential": it
            calls the model once per element, in C++. "expand_dims" and "broadcast_all": the model
            is called once and gets the mapped axis as axis 0 of its arguments, and must return it
            as axis 0 of every result; an argument that is not mapped gets an axis of size 1
            ("expand_dims") or is repeated. "torch": `torch.func.vmap`, eager models only. A package
            has fixed ranks, so it takes "sequential" only.
        sharding_rule: the axes that `jit` over sharded arrays divides among devices, as a string or
            `SdyShardingRule` of `jax.experimental.custom_partitioning`, operands and outputs in
            JAX's order: in "b i, j -> b", each device calls the model on its part of "b". An axis
            that some output lacks, or that is part of a compound, is gathered.
        share_inputs: True hands an eager model XLA's own memory instead of copies of its inputs,
            which saves a copy of each input that is not cast. Such a model must not write to its
            inputs, and must not retain them after the call: no tensor, view, NumPy array or DLPack
            capsule of them, and no thread that reads them, because XLA reuses the memory. A write
            in place, or a reference that is left, is an error if torch or Python count it. Writes
            and references by NumPy, other libraries and threads may go unnoticed. TorchScript and
            packages refuse the option: they copy only what they must.
        threads: torch's CPU threads inside a call. None: the process's budget, which is torch's own
            number or that of `torchcall.set_num_threads`. A number: that many. "auto": `warmup`
            times the call with 1, 2, 4, … threads up to the budget and keeps the smallest number
            within 5 % of the fastest, for calls of these shapes and dtypes, also in programs that
            are compiled already. Other calls, and calls on a GPU, use the budget.
        cuda_graph: on a CUDA device, whether calls become replays of a CUDA graph: "auto" where
            the model can be captured (the second call on a device tries), "off" never, "require"
            as "auto", but a model that cannot be captured is an error. A capture that another
            thread may have invalidated is tried three times in all; calls between two attempts run
            without a graph, with "require" too.

    XLA merges equal calls and drops calls whose outputs are unused, so a model that draws random
    numbers draws them once per distinct call. `jax_debug_nans` and `checkify`'s float checks find
    NaNs that a model returns.

    Raises:
        TypeError, ValueError, FileNotFoundError: at construction: the model is unusable. At a call:
            an argument is unusable; the error names it.
        jax.errors.JaxRuntimeError: a call fails inside torch, or an output has another shape or
            dtype than expected. JAX may raise the same text as a ValueError. The process stays
            usable.
    """

    def __init__(
        self,
        module: Callable[..., Any] | torch.jit.ScriptFunction | str | Path,
        *,
        requires_grad: bool = False,
        input_spec: Any = None,
        output_spec: Any = None,
        freeze: bool = False,
        vmap_method: Literal["sequential", "expand_dims", "broadcast_all", "torch"] = "sequential",
        sharding_rule: Any = None,
        share_inputs: bool = False,
        threads: int | Literal["auto"] | None = None,
        cuda_graph: Literal["auto", "off", "require"] = "auto",
    ) -> None:
        if cuda_graph not in ("auto", "off", "require"):
            raise ValueError(
                f"torchcall: cuda_graph: expected 'auto', 'off' or 'require', got {cuda_graph!r}"
            )
        booleans = {
            "requires_grad": requires_grad,
            "freeze": freeze,
            "share_inputs": share_inputs,
        }
        for option, value in booleans.items():
            if not isinstance(value, bool):
                raise TypeError(f"torchcall: {option}: expected True or False, got {value!r}")
        self._source = source_of(module, share_inputs=share_inputs)
        check_vmap_method(vmap_method, self._source.engine)
        self._options: dict[str, Any] = {
            "requires_grad": requires_grad,
            "input_spec": input_spec,
            "output_spec": output_spec,
            "freeze": freeze,
            "vmap_method": vmap_method,
            "sharding_rule": ShardingRule.of(sharding_rule),
            "share_inputs": share_inputs,
            "threads": checked_threads(threads),
            "cuda_graph": cuda_graph,
        }
        self._name = self._source.name
        self._model = _bridge.between_captures(self._load)
        self._name = self._source.name
        self._prepared: OrderedDict[Any, Prepared] = OrderedDict()
        self._plans: weakref.WeakSet[CallPlan] = weakref.WeakSet()
        self._facts: dict[str, tuple[Callable[[Any], Any], Any]] = {}
        self._exported = Model(self._model, self._name, partial(check_sizes, self._source))
        self._pid = os.getpid()
        # Why another layer chose this engine, not a faster one; for `stats`.
        self._fallback = ""
        self.__name__ = self._source.label

    # Calls

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(args, kwargs)

    def _call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions = _NO_OPTIONS,
        lengths: Sequence[Any] = (),
    ) -> Any:
        """Calls the model. `lengths` are the int32 scalars of `Narrowing`, in its order."""
        prepared, operands = self._prepared_call(args, kwargs, options, lengths)
        outputs = bind(prepared.plan, operands) if any_traced(operands) else prepared.run(*operands)
        return jax.tree.unflatten(prepared.structure, outputs)

    def _prepared_call(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions,
        lengths: Sequence[Any],
    ) -> tuple[Prepared, list[Any]]:
        """The plan of a call, and its operands."""
        try:
            leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=lambda x: x is None)
        except ValueError:
            try:
                check_keys(args, "operand args")
                check_keys(kwargs, "operand kwargs")
            except ValueError as error:
                raise ValueError(self._say(str(error))) from None
            raise
        operands = [leaf for leaf in leaves if not is_static(leaf)]
        operands += lengths
        return self._prepare(leaves, treedef, options), operands

    def warmup(self, *args: Any, **kwargs: Any) -> None:
        """Calls the model twice on these arguments, real data, and waits for the results.

        This makes the plan, allocates its buffers and starts torch's threads, so that the first
        step of a loop takes as long as the others. On a CUDA device the second call captures the
        CUDA graph that later calls replay.

        With `threads="auto"`, it then measures the number of threads: for up to a second, or
        with two calls of each number if a call takes longer. `stats` has the result. Each warm-up
        measures again, one at a time in the process. Other calls of these shapes may run meanwhile.

        Raises:
            TypeError: an argument is traced: call it outside `jax.jit`.
        """
        self._warm(args, kwargs)

    def _warm(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: CallOptions = _NO_OPTIONS,
        lengths: Sequence[Any] = (),
    ) -> None:
        """`warmup` of the call that `_call` makes with these arguments."""
        prepared, operands = self._prepared_call(args, kwargs, options, lengths)
        if any_traced(operands):
            raise TypeError(
                self._say("warmup: expected real data, got traced arrays; call it outside jax.jit")
            )
        with jax.ensure_compile_time_eval():  # while a function is traced, too
            warm_up(prepared, operands, measure=self._options["threads"] == "auto")

    def refresh(self) -> None:
        """Reloads the weights, also for programs that are compiled already.

        Needed after weights were changed in place if calls run on another device than the module's,
        or with `freeze=True`, and after a parameter was replaced. Otherwise the weights are shared
        and changes apply immediately. A path is read again; the new package may have other weights
        and code, but must have the same arguments and results.

        Raises:
            ValueError: the code of a TorchScript model, the arguments or results of a package, or
                the elements that a potential declares have changed; make a new wrapper.
        """
        self._refuse_fork()
        try:
            _bridge.between_captures(self._replace)
        except ValueError as error:
            raise ValueError(self._say(str(error))) from error

    def stats(self) -> dict[str, Any]:
        """Counts since the wrapper was made, over all compiled programs.

        Returns:
            `engine`, "TorchScript", "AOTInductor" or "eager"; `calls`; `reused` (calls answered
            with the results of an equal one before, without the model); `bytes_copied` (outputs,
            and inputs that were cast or copied); `plans` alive; `weights`, "shared" with the
            caller's module, "copied" from it or the file's "own";
            `copied_inputs` (inputs that the model got as private copies: all inputs of an eager
            model, else those that it may write to); `retained_inputs` (inputs that a TorchScript
            model retained after a call; each became a copy); `devices` of the calls so far;
            `graph_captures`, `graph_replays` of CUDA graphs; `threads`, the option;
            `measured_threads`, one entry per plan that was warmed up with `threads="auto"`:
            `operands` (shapes by name), `threads` (the choice), `us` (median µs per call by number
            of threads); `fallback`, the reason for a slower path, or None.
        """
        fallback = self._model.fallback or self._fallback or None
        if self._source.weights == "copied" and self._source.engine == "TorchScript":
            fallback = "the module's C++ object is not accessible, so it was serialised and loaded"
        return {
            "engine": self._source.engine,
            **self._model.stats(),
            "plans": len(self._plans),
            "weights": self._source.weights,
            "devices": self._model.devices,
            "threads": self._options["threads"],
            "measured_threads": measured_threads(list(self._prepared.values())),
            "fallback": fallback,
        }

    def __repr__(self) -> str:
        changed = {
            name: value
            for name, value in self._options.items()
            if value is not None
            and value is not False
            and (name, value) not in (("vmap_method", "sequential"), ("cuda_graph", "auto"))
        }
        options = "".join(f", {name}={value!r}" for name, value in changed.items())
        if self._fallback:
            options += f", fallback={textwrap.shorten(self._fallback, 100)!r}"
        calls = self._model.stats()["calls"]
        return f"{type(self).__name__}({self._name}, {self._source.engine}{options}, calls={calls})"

    def __deepcopy__(self, memo: Any) -> "TorchModuleWrapper":
        del memo
        return self  # compared by identity, so that copied states hold the same wrapper

    def __reduce__(self) -> Any:
        if self._source.path is None:
            raise TypeError(
                self._say("a wrapper of a live module cannot be pickled; wrap a path instead")
            )
        return _rebuild, (str(self._source.path), self._options)

    def _infer(self, *args: Any) -> Any:
        """The outputs for arguments of these shapes and dtypes, by tracing; no plan is made.

        Args:
            *args: pytrees of `jax.ShapeDtypeStruct`.

        Raises:
            InferenceError: the model cannot be traced.
            TypeError, ValueError: the arguments do not fit the model's or `input_spec`.
        """
        specs, treedef = jax.tree.flatten((args, {}))
        call = describe_call(treedef, specs, self._options, _NO_OPTIONS)
        return self._source.prepare_call(self._model, call).infer_outputs()

    def _inspected(self) -> Any:
        """The Python object behind the model, to read attributes of; a package's metadata."""
        return self._source.python_module(self._model)

    def _fact(self, name: str, read: Callable[[Any], Any]) -> Any:
        """What `read` finds in `_inspected()`. `refresh` refuses a model where that differs."""
        if name not in self._facts:
            self._facts[name] = read, read(self._inspected())
        return self._facts[name][1]

    def _replace(self) -> None:
        fresh = self._load()
        for name, (read, known) in self._facts.items():
            found = read(self._source.python_module(fresh))
            if found != known:
                raise ValueError(
                    f"refresh: expected the same {name}, {known}, got {found}; make a new wrapper"
                )
        replace(self._model, fresh)

    # Plans

    def _prepare(
        self, leaves: list[Any], treedef: Any, options: CallOptions = _NO_OPTIONS
    ) -> Prepared:
        self._refuse_fork()
        try:
            specs = leaf_specs(treedef, leaves, options)
            key = plan_key(treedef, specs, options)
            prepared = self._prepared.get(key)
            if prepared is None:
                call = describe_call(treedef, specs, self._options, options)
                engine_call = partial(self._source.prepare_call, self._model)
                prepared = self._remember(key, prepare(self._model, self._name, call, engine_call))
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(self._say(str(error))) from error.__cause__
        return prepared

    def _refuse_fork(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                self._say("this process was forked after torch was loaded; start it by 'spawn'")
            )

    def _remember(self, key: Hashable, prepared: Prepared) -> Prepared:
        # Threads may prepare the same call at once. All use one plan, which warm-up measures.
        prepared = self._prepared.setdefault(key, prepared)
        self._plans.add(prepared.plan)
        if len(self._prepared) > MOST_PLANS:
            self._prepared.popitem(last=False)
        return prepared

    def _load(self) -> _bridge.Model:
        try:
            return self._source.load(
                freeze=self._options["freeze"], requires_grad=self._options["requires_grad"]
            )
        except ValueError as error:
            raise ValueError(self._say(str(error))) from error

    def _say(self, message: str) -> str:
        return (
            message if message.startswith("torchcall:") else f"torchcall: {self._name}: {message}"
        )


def load(path: str | Path, *, allow_pickle: bool = False, **options: Any) -> TorchModuleWrapper:
    """Wraps a model file.

    Args:
        path: a TorchScript archive, as written by `torch.jit.ScriptModule.save`, or an AOTInductor
            package.
        allow_pickle: whether a file made by `torch.save` may be unpickled, which runs whatever code
            the file names. What comes out must be something that `TorchModuleWrapper` takes.
        **options: those of `TorchModuleWrapper`.

    Raises:
        FileNotFoundError, ValueError, TypeError: if the file is missing, empty, damaged, pickled
            (without `allow_pickle`) or of another kind; the message says which.
    """
    try:
        return TorchModuleWrapper(Path(path), **options)
    except PickledModelError:
        if not allow_pickle:
            raise
        return TorchModuleWrapper(unpickle(Path(path)), **options)  # pyright: ignore[reportArgumentType]


def _rebuild(path: str, options: dict[str, Any]) -> TorchModuleWrapper:
    return TorchModuleWrapper(path, **options)
