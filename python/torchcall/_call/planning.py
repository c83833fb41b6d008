"""From the arguments of one call to its plan: names, casts, structure, outputs."""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import torch

from torchcall import _bridge
from torchcall._call.call import Call, EngineCall
from torchcall._call.narrowing import CallOptions, Narrowing, is_axis
from torchcall._call.plan import CallPlan, Operand, Output, PlanStructure
from torchcall._call.primitive import compiled
from torchcall._call.specs import (
    DTYPE_NAMES,
    describe,
    is_static,
    path_name,
    shape_dtype,
    static_key,
    torch_dtype_name,
    type_name,
)
from torchcall._call.tree import broadcast_prefix


@dataclasses.dataclass(frozen=True)
class CallRequest:
    """A call as the wrapper sees it.

    Attributes:
        args, kwargs: the arguments.
        specs: per leaf of `(args, kwargs)`, None counting as one: its `jax.ShapeDtypeStruct`, or
            the static Python value itself.
        treedef: the structure of `(args, kwargs)` over those leaves.
        input_spec, output_spec, requires_grad: the wrapper's options.
        cuda_graph: likewise.
        look_at: the engine's look at the call.
        options: what the call asks for besides.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    specs: list[Any]
    treedef: Any
    input_spec: Any
    output_spec: Any
    requires_grad: bool
    cuda_graph: str
    look_at: Callable[[Call], EngineCall]
    options: CallOptions


class Prepared:
    """A plan, the function that runs it outside any program, and the outputs' structure."""

    def __init__(self, plan: CallPlan, structure: Any) -> None:
        self.plan = plan
        self.structure = structure
        self.run = compiled(plan)
        plan.set_eager(self.run)


def leaf_specs(treedef: Any, leaves: list[Any]) -> list[Any]:
    """What is static of each leaf: shape and dtype of an array, a Python value as it is.

    Raises:
        TypeError: naming the leaf that can not cross the bridge.
    """
    specs = []
    for i, leaf in enumerate(leaves):
        try:
            specs.append(leaf if is_static(leaf) else shape_dtype("", leaf))
        except TypeError:
            specs.append(shape_dtype(_leaf_names(treedef)[i], leaf))
    return specs


def plan_key(treedef: Any, specs: list[Any], options: CallOptions) -> Hashable:
    """Equal for calls that one plan serves."""
    leaves = tuple(
        static_key(spec) if is_static(spec) else (spec.shape, str(spec.dtype)) for spec in specs
    )
    return treedef, leaves, options.key(), jax.dtypes.canonicalize_dtype(float)


def prepare(model: _bridge.Model, model_name: str, request: CallRequest) -> Prepared:
    """Makes the plan of a call.

    Raises:
        ValueError, TypeError: naming the operand, output or option that is at fault.
    """
    names = _leaf_names(request.treedef)
    casts = _casts(request, names)
    call = Call(
        treedef=request.treedef,
        names=names,
        specs=request.specs,
        casts=casts,
        requires_grad=request.requires_grad,
        selects_outputs=request.options.outputs is not None,
        outputs_known=request.options.outputs is not None or request.output_spec is not None,
    )
    looked_at = request.look_at(call)
    narrowing, checks = request.options.narrowing, request.options.index_checks
    axes = (None,) * len(names) if narrowing is None else narrowing.inputs
    operands = [
        Operand(names[i], request.specs[i], casts[i], axes[i], copied)
        for i, copied in zip(call.arrays, looked_at.copies, strict=True)
    ]
    output_tree = _output_tree(looked_at, request)
    outputs, structure = _outputs(output_tree, narrowing)
    lengths = []
    if narrowing is not None:
        scalar = jax.ShapeDtypeStruct((), jax.numpy.int32)
        first = len(operands)
        lengths = [
            (first + i, narrowing.extra, narrowing.least) for i in range(len(narrowing.names))
        ]
        operands += [Operand(f"length {name}", scalar) for name in narrowing.names]
    plan = CallPlan(
        model,
        model_name,
        operands,
        outputs,
        PlanStructure(
            lengths=lengths,
            arguments=looked_at.arguments,
            results=looked_at.results(output_tree),
            selects_outputs=call.selects_outputs,
            index_checks=list(dict.fromkeys([*looked_at.index_checks, *checks])),
            callable=looked_at.callable(output_tree, len(lengths)),
            cuda_graph=request.cuda_graph,
            graph_refusal=_graph_refusal(model),
            device=looked_at.device,
        ),
    )
    return Prepared(plan, structure)


def _graph_refusal(model: _bridge.Model) -> str:
    """Why no call of this model can be a replay of a CUDA graph, as far as its code tells."""
    if model.keeps_state:
        return "the model changes its own attributes, which a replay would not do again"
    if model.draws_random_numbers:
        return "the model draws random numbers, which a replay would draw again"
    return ""


def _outputs(output_tree: Any, narrowing: Narrowing | None) -> tuple[list[Output], Any]:
    paths, structure = jax.tree_util.tree_flatten_with_path(output_tree)
    axes: list[Any] = [None] * len(paths)
    if narrowing is not None:
        axes = broadcast_prefix(narrowing.outputs, output_tree, is_axis, "narrowing")
    outputs = []
    for (path, spec), axis in zip(paths, axes, strict=True):
        name = path_name("output ", path).strip()
        _check_output(name, spec)
        outputs.append(Output(name, spec, axis))
    return outputs, structure


def _casts(request: CallRequest, names: list[str]) -> list[str | None]:
    tree = (request.args, request.kwargs)
    casts = broadcast_prefix(request.input_spec, tree, _is_cast, "input_spec")
    cast_names = [None if cast is None else _cast_name(cast) for cast in casts]
    for name, spec, cast in zip(names, request.specs, cast_names, strict=True):
        if cast is not None and is_static(spec):
            raise ValueError(f"input_spec: {name}: expected an array to cast, got {spec!r}")
    return cast_names


def _output_tree(looked_at: EngineCall, request: CallRequest) -> Any:
    if request.options.outputs is not None:
        return request.options.outputs
    if request.output_spec is None:
        return looked_at.infer_outputs()
    specs = request.output_spec
    if callable(specs):
        args, kwargs = jax.tree.unflatten(request.treedef, request.specs)
        try:
            specs = specs(*args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"output_spec: the function raised {type(error).__name__}: {error}"
            ) from error
    if not jax.tree.leaves(specs):
        raise ValueError(f"output_spec: expected at least one jax.ShapeDtypeStruct, got {specs!r}")
    return specs


def _leaf_names(treedef: Any) -> list[str]:
    indexed = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    paths, _ = jax.tree_util.tree_flatten_with_path(indexed)
    return [
        path_name(("operand args", "operand kwargs")[path[0].idx], path[1:]) for path, _ in paths
    ]


def _is_cast(value: object) -> bool:
    return value is None or isinstance(value, torch.dtype)


def _cast_name(cast: torch.dtype) -> str:
    name = torch_dtype_name(cast)
    if name not in DTYPE_NAMES:
        raise ValueError(f"input_spec: expected one of {sorted(DTYPE_NAMES)}, got {cast}")
    return name


def _check_output(name: str, spec: Any) -> None:
    if not (hasattr(spec, "shape") and hasattr(spec, "dtype")):
        raise TypeError(
            f"output_spec: {name}: expected a jax.ShapeDtypeStruct, got {type_name(spec)}"
        )
    if any(size < 0 for size in spec.shape):
        raise ValueError(f"output_spec: {name}: expected sizes >= 0, got {tuple(spec.shape)}")
    if str(spec.dtype) not in DTYPE_NAMES:
        raise TypeError(
            f"{name}: expected one of the dtypes that JAX and torch share, got {spec.dtype}"
        )
    held = jax.dtypes.canonicalize_dtype(spec.dtype)
    if held != spec.dtype:
        raise TypeError(
            f"{name}: expected a dtype that JAX can hold, got {describe(spec)} with x64 off;"
            f" return {held} from the model, or set jax.config.update('jax_enable_x64', True)"
        )
