"""From the arguments of one call to its plan: names, casts, structure, outputs."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import torch

from torchcall import _bridge
from torchcall._call.call import Call, CallOptions, EngineCall
from torchcall._call.narrowing import Axis, Narrowing, is_axis
from torchcall._call.plan import CallPlan, Operand, PlanSpec
from torchcall._call.sharding import Factors, Sharding, divided
from torchcall._call.specs import (
    DTYPE_NAMES,
    describe,
    is_static,
    is_symbolic,
    path_name,
    shape_dtype,
    static_key,
    torch_dtype_name,
    type_name,
)
from torchcall._call.transforms import compiled
from torchcall._call.tree import broadcast_prefix, check_keys


class Prepared:
    """A plan, the function that runs it outside any program, and the structure of its outputs."""

    def __init__(self, plan: CallPlan, structure: Any) -> None:
        self.plan = plan
        self.structure = structure
        self.run = compiled(plan)
        plan.set_eager(self.run)


def leaf_specs(treedef: Any, leaves: list[Any], options: CallOptions) -> list[Any]:
    """Per leaf: the shape and dtype of an array, or the Python value itself.

    Raises:
        TypeError: a leaf is neither a supported array nor a Python scalar; the message names it.
    """
    specs = []
    for i, leaf in enumerate(leaves):
        try:
            specs.append(leaf if is_static(leaf) else shape_dtype("", leaf))
        except TypeError:
            names = _leaf_names(treedef, options.has_parameters)
            specs.append(shape_dtype(names[i], leaf))
    return specs


def plan_key(treedef: Any, specs: list[Any], options: CallOptions) -> Hashable:
    """A key that is equal for calls that can use the same plan."""
    leaves = tuple(
        static_key(spec) if is_static(spec) else (spec.shape, str(spec.dtype)) for spec in specs
    )
    return treedef, leaves, options.key(), jax.dtypes.canonicalize_dtype(float)


def describe_call(
    treedef: Any, specs: list[Any], wrapper_options: Mapping[str, Any], options: CallOptions
) -> Call:
    """Makes the description of a call.

    Args:
        treedef: the structure of `(args, kwargs)`, None counting as a leaf.
        specs: per leaf: its `jax.ShapeDtypeStruct`, or the static Python value itself.
        wrapper_options: those of `TorchModuleWrapper`.
        options: internal options.

    Raises:
        ValueError: `input_spec` does not fit the arguments.
    """
    names = _leaf_names(treedef, options.has_parameters)
    return Call(
        treedef=treedef,
        specs=specs,
        names=names,
        casts=_casts(wrapper_options["input_spec"], treedef, specs, names),
        output_spec=wrapper_options["output_spec"],
        requires_grad=wrapper_options["requires_grad"],
        cuda_graph=wrapper_options["cuda_graph"],
        threads=wrapper_options["threads"],
        vmap_method=wrapper_options["vmap_method"],
        sharding_rule=wrapper_options["sharding_rule"],
        options=options,
    )


def prepare(
    model: _bridge.Model, model_name: str, call: Call, engine_call: Callable[[Call], EngineCall]
) -> Prepared:
    """Makes the plan of a call.

    Args:
        model: the native model.
        model_name: what errors call it.
        call: the call.
        engine_call: what the engine adds to a call.

    Raises:
        ValueError, TypeError: an operand, output or option is invalid; the message names it.
    """
    spec, structure, device = _plan_spec(model, call, engine_call(call))
    sharding = None
    if call.sharding_rule is not None:
        if call.selects_outputs or spec.lengths or spec.gradient_of:
            raise ValueError(
                "sharding_rule: expected None for a potential, because edges connect atoms along "
                "the axes of its arrays; call it inside jax.shard_map, on whole systems"
            )
        factors = Factors.of(call.sharding_rule, spec.operands, spec.outputs)

        def shard(parts: Mapping[str, int]) -> CallPlan:
            part = _part_of(call, spec, structure, factors, parts)
            try:
                spec_of_part, _, _ = _plan_spec(model, part, engine_call(part))
            except (ValueError, TypeError) as error:
                raise type(error)(f"torchcall: {model_name}: one device's part: {error}") from None
            return CallPlan(model, model_name, spec_of_part, device, compiled)

        sharding = Sharding(factors, shard)
    return Prepared(CallPlan(model, model_name, spec, device, compiled, sharding), structure)


def _part_of(
    call: Call, spec: PlanSpec, structure: Any, factors: Factors, parts: Mapping[str, int]
) -> Call:
    """The call on one device's part of the arrays."""
    specs = list(call.specs)
    for i, axes in zip(call.arrays, factors.operands, strict=True):
        shape = divided(specs[i].shape, axes, parts)
        specs[i] = jax.ShapeDtypeStruct(shape, specs[i].dtype)
    outputs = [
        jax.ShapeDtypeStruct(divided(output.shape, axes, parts), jax.numpy.dtype(output.dtype))
        for output, axes in zip(spec.outputs, factors.outputs, strict=True)
    ]
    return dataclasses.replace(
        call, specs=specs, output_spec=jax.tree.unflatten(structure, outputs), sharding_rule=None
    )


def _plan_spec(
    model: _bridge.Model, call: Call, engine_call: EngineCall
) -> tuple[PlanSpec, Any, str | None]:
    """What a plan needs, the structure of its outputs, and the device of the engine's code."""
    narrowing = call.options.narrowing
    axes = (None,) * len(call.names) if narrowing is None else narrowing.inputs
    operands = [
        _operand(call.names[i], call.specs[i], axes[i], call.casts[i], copied)
        for i, copied in zip(call.arrays, engine_call.copies, strict=True)
    ]
    output_tree = _output_tree(call, engine_call)
    check_keys(output_tree, "output")
    outputs, structure = _outputs(output_tree, narrowing)
    lengths = []
    if narrowing is not None:
        scalar = jax.ShapeDtypeStruct((), jax.numpy.int32)
        for name in narrowing.names:
            lengths.append((len(operands), narrowing.extra, narrowing.least))
            operands.append(_operand(f"length {name}", scalar))
    spec = PlanSpec(
        operands=operands,
        outputs=outputs,
        lengths=lengths,
        arguments=engine_call.arguments,
        results=engine_call.results(output_tree),
        selects_outputs=call.selects_outputs,
        index_checks=list(dict.fromkeys([*engine_call.index_checks, *call.options.index_checks])),
        parameters=engine_call.parameters,
        eager_runner=engine_call.eager_runner(output_tree, len(lengths)),
        cuda_graph=call.cuda_graph,
        graph_refusal=_graph_refusal(model),
        threads=call.threads,
        reuses_last=call.options.reuses_last,
        loops=[],
        derivatives=[],
        vmap_method=call.vmap_method,
        no_derivatives=engine_call.no_derivatives,
        gradient_of=call.options.gradient_of,
        derivative=engine_call.derivative,
    )
    return spec, structure, engine_call.device


def _operand(
    name: str,
    spec: jax.ShapeDtypeStruct,
    narrow: Axis | None = None,
    cast: str | None = None,
    copied: bool = False,
) -> Operand:
    return Operand(name, str(spec.dtype), list(spec.shape), cast, narrow, copied)


def _graph_refusal(model: _bridge.Model) -> str:
    """Why calls of this model cannot be replays of a CUDA graph, or "": what its code shows."""
    if model.changes_state:
        return "the model changes its own attributes, which a replay would not do again"
    if model.draws_random_numbers:
        return "the model draws random numbers, which a replay would draw again"
    return ""


def _outputs(output_tree: Any, narrowing: Narrowing | None) -> tuple[list[Operand], Any]:
    paths, structure = jax.tree_util.tree_flatten_with_path(output_tree)
    axes: list[Any] = [None] * len(paths)
    if narrowing is not None:
        axes = broadcast_prefix(narrowing.outputs, output_tree, is_axis, "narrowing", "an Axis")
    outputs = []
    for (path, spec), axis in zip(paths, axes, strict=True):
        name = path_name("output ", path).strip()
        _check_output(name, spec)
        outputs.append(_operand(name, spec, axis))
    return outputs, structure


def _casts(input_spec: Any, treedef: Any, specs: list[Any], names: list[str]) -> list[str | None]:
    tree = jax.tree.unflatten(treedef, specs)
    casts = broadcast_prefix(input_spec, tree, _is_cast, "input_spec", "a torch.dtype or None")
    cast_names = [None if cast is None else _cast_name(cast) for cast in casts]
    for name, spec, cast in zip(names, specs, cast_names, strict=True):
        if cast is not None and is_static(spec):
            raise ValueError(f"input_spec: {name}: expected an array to cast, got {spec!r}")
    return cast_names


def _output_tree(call: Call, engine_call: EngineCall) -> Any:
    if call.options.outputs is not None:
        return call.options.outputs
    if call.output_spec is None:
        return engine_call.infer_outputs()
    specs = call.output_spec
    if callable(specs):
        args, kwargs = call.arguments()
        try:
            specs = specs(*args, **kwargs)
        except Exception as error:
            raise ValueError(
                f"output_spec: the function raised {type(error).__name__}: {error}"
            ) from error
    check_keys(specs, "output_spec")
    if not jax.tree.leaves(specs):
        raise ValueError(f"output_spec: expected at least one jax.ShapeDtypeStruct, got {specs!r}")
    return specs


def _leaf_names(treedef: Any, has_parameters: bool) -> list[str]:
    indexed = jax.tree.unflatten(treedef, range(treedef.num_leaves))
    if has_parameters:
        (parameters, *args), kwargs = indexed
        trees = {"parameters": parameters, "operand args": args, "operand kwargs": kwargs}
    else:
        trees = dict(zip(("operand args", "operand kwargs"), indexed, strict=True))
    return [
        path_name(root, path)
        for root, tree in trees.items()
        for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]
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
    if any(size < 0 for size in spec.shape if not is_symbolic(size)):
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
