"""JAX's transformations of a call: derivatives and mapped axes.

A call's tangent is a primitive of its own, linear in the tangents of the operands. Reverse mode
transposes it to a vector-Jacobian product, which is a call again. Forward mode evaluates it as the
derivative of that product with respect to the cotangent: the product is linear in the cotangent,
so its derivative does not depend on where it is taken ("double backward"; torch has a forward rule
for some operations only).
"""

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from torchcall._call import partition
from torchcall._call.derive import differentiable, mapped_plan, require_gradients, vjp_plan
from torchcall._call.meshes import aligned, resharded, results
from torchcall._call.plan import CallPlan
from torchcall._call.primitive import call, call_p, compiled, refuse, sharded_p
from torchcall._undocumented.of_jax import (
    Primitive,
    ShapedArray,
    Zero,
    check_nans,
    is_undefined_primal,
    lower_fun,
    primitive_batchers,
    primitive_jvps,
    primitive_transposes,
    register_lowering,
)

__all__ = ["compiled", "partition"]  # `planning` imports this, so that all rules are registered

# The outputs of floating point, for tangents of the operands `inputs`.
tangent_p = Primitive("torchcall_tangent")
tangent_p.multiple_results = True
check_nans(tangent_p, lambda plan, **_: f"torchcall: tangent of {plan.model_name}")


def _differentiable_outputs(plan: CallPlan) -> list[int]:
    return [j for j, output in enumerate(plan.spec.outputs) if differentiable(output)]


def _zero_tangent(primal: Any) -> Zero:
    return Zero(jax.typeof(primal).to_tangent_aval())


@tangent_p.def_abstract_eval
def _tangent_abstract_eval(
    *operands: Any, plan: CallPlan, inputs: tuple[int, ...]
) -> list[ShapedArray]:
    outputs = _differentiable_outputs(plan)
    specs = [plan.outputs[j] for j in outputs]
    if plan.sharding is None:
        return results(specs, operands)
    given = plan.sharding.factors.all_operands(plan.spec.loops)
    made = plan.sharding.factors.all_outputs()
    return results(
        specs, operands, [*given, *(given[i] for i in inputs)], [made[j] for j in outputs]
    )


def _tangent_call(
    plan: CallPlan, inputs: tuple[int, ...], operands: Sequence[Any]
) -> tuple[CallPlan, list[Any]]:
    """The call that evaluates a tangent."""
    # A tangent has the mapped axes of its operand.
    mapped = [[axis[i] for i in inputs] for _, axis in plan.spec.loops]
    gradient_of = plan.spec.gradient_of
    if set(inputs) <= set(gradient_of):
        # The Jacobian J is symmetric: J v = vᵀ J, one vector-Jacobian product.
        same = [gradient_of.index(i) for i in inputs]
        return vjp_plan(plan, gradient_of, same, mapped), list(operands)
    outputs = _differentiable_outputs(plan)
    n = len(plan.spec.operands)
    cotangents = range(n, n + len(outputs))
    evaluated = vjp_plan(vjp_plan(plan, inputs, outputs), cotangents, range(len(inputs)), mapped)
    # Of ones, so that a gradient which is zero depends on no cotangent.
    anywhere = [_ones(plan.outputs[j].shape, plan.outputs[j].dtype) for j in outputs]
    return evaluated, [*operands[:n], *anywhere, *operands[n:]]


def _ones(shape: Sequence[int], dtype: Any) -> jax.Array:
    """Ones in 64 bits also where a program that was traced with x64 on is used with x64 off."""
    with jax.enable_x64(True):
        return jnp.ones(shape, dtype)


def tangent_plan(plan: CallPlan, inputs: tuple[int, ...]) -> CallPlan:
    """The plan of the call that evaluates a tangent."""
    return _tangent_call(plan, inputs, [None] * (len(plan.spec.operands) + len(inputs)))[0]


def _tangent(*operands: Any, plan: CallPlan, inputs: tuple[int, ...]) -> list[jax.Array]:
    evaluated, given = _tangent_call(plan, inputs, operands)
    return call(evaluated, given)


tangent_p.def_impl(_tangent)
register_lowering(tangent_p, lower_fun(_tangent, multiple_results=True))


def _jvp(primals: Any, tangents: Any, *, plan: CallPlan) -> Any:
    inputs = tuple(
        i
        for i, (tangent, operand) in enumerate(zip(tangents, plan.spec.operands, strict=True))
        if type(tangent) is not Zero and differentiable(operand)
    )
    outputs = _differentiable_outputs(plan)
    moving = [tangents[i] for i in inputs]
    if inputs and outputs:
        require_gradients(plan, inputs)
    if not inputs or not outputs:
        values, found = call(plan, primals), []
    elif len(outputs) == 1 and _is_ordinary_number(plan, inputs, outputs[0]):
        values, found = _with_gradient(plan, inputs, outputs[0], primals, moving)
    else:
        values = call(plan, primals)
        found = tangent_p.bind(*aligned([*primals, *moving]), plan=plan, inputs=inputs)
    all_tangents = [_zero_tangent(value) for value in values]
    for j, tangent in zip(outputs, found, strict=False):
        all_tangents[j] = tangent
    return values, all_tangents


def _is_ordinary_number(plan: CallPlan, inputs: tuple[int, ...], output: int) -> bool:
    arrays = [plan.spec.outputs[output], *(plan.spec.operands[i] for i in inputs)]
    # The gradient for the cotangent 1 is not the model's for a large one in float16: scaling the
    # loss is what prevents that it underflows.
    unfit = ("complex", "float16")
    fits = not any(name.startswith(unfit) for x in arrays for name in (x.dtype, x.cast or x.dtype))
    return fits and math.prod(plan.spec.outputs[output].shape) == 1


def _with_gradient(
    plan: CallPlan, inputs: tuple[int, ...], output: int, primals: Any, tangents: Any
) -> tuple[Any, list[Any]]:
    """One call for a single number and its gradient, and the tangent `Σ ⟨gradient, tangent⟩`."""
    spec = plan.spec.outputs[output]
    not_mapped = [[False]] * len(plan.spec.loops)
    both = vjp_plan(plan, inputs, [output], not_mapped, keeps_outputs=True)
    found = call(both, [*primals, _ones(spec.shape, spec.dtype)])
    values, gradients = found[: len(plan.outputs)], found[len(plan.outputs) :]
    total = 0
    for i, gradient, tangent in zip(inputs, gradients, tangents, strict=True):
        mapped = [k for k, (_, has) in enumerate(plan.spec.loops) if not has[i]]
        tangent = jnp.expand_dims(tangent, mapped)
        own = range(len(plan.spec.loops), gradient.ndim)
        total += jnp.sum(gradient * tangent, axis=tuple(own)).astype(spec.dtype)
    return values, [jnp.reshape(total, plan.outputs[output].shape)]


def _tangent_jvp(primals: Any, tangents: Any, *, plan: CallPlan, inputs: tuple[int, ...]) -> Any:
    evaluated, given = _tangent_call(plan, inputs, primals)
    n = len(plan.spec.operands)
    constant = [_zero_tangent(x) for x in given[n : len(given) - len(inputs)]]  # may be none
    return _jvp(given, [*tangents[:n], *constant, *tangents[n:]], plan=evaluated)


def _tangent_transpose(
    cotangents: Any, *operands: Any, plan: CallPlan, inputs: tuple[int, ...]
) -> list[Any]:
    n = len(plan.spec.operands)
    primals, tangents = operands[:n], operands[n:]
    given = [
        (j, cotangent)
        for j, cotangent in zip(_differentiable_outputs(plan), cotangents, strict=True)
        if type(cotangent) is not Zero
    ]
    wanted = [i for i, x in zip(inputs, tangents, strict=True) if is_undefined_primal(x)]
    transposed = vjp_plan(plan, wanted, [j for j, _ in given])
    found = call(transposed, [*primals, *(cotangent for _, cotangent in given)])
    gradients = {
        i: resharded(_summed(plan, i, gradient), tangents[inputs.index(i)].aval)
        for i, gradient in zip(wanted, found, strict=True)
    }
    return [None] * n + [gradients.get(i) for i in inputs]


def _summed(plan: CallPlan, operand: int, gradient: jax.Array) -> jax.Array:
    """The sum over mapped axes that the operand does not have: every element used it."""
    axes = [k for k, (_, mapped) in enumerate(plan.spec.loops) if not mapped[operand]]
    return jnp.sum(gradient, axis=axes) if axes else gradient


def _formed(x: Any, dim: Any, form: str, size: int) -> Any:
    if dim is not None:
        return jnp.moveaxis(x, dim, 0)
    if form == "as it is":
        return x
    return jnp.broadcast_to(x, (1 if form == "one" else size, *x.shape))


def _size(args: Sequence[Any], dims: Sequence[Any]) -> int:
    return next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)


def _batch(args: Any, dims: Any, *, plan: CallPlan) -> Any:
    size = _size(args, dims)
    one_call, forms = mapped_plan(plan, size, [d is not None for d in dims])
    given = [_formed(x, d, form, size) for x, d, form in zip(args, dims, forms, strict=True)]
    values = call(one_call, given)
    return values, [0] * len(values)


def _tangent_batch(args: Any, dims: Any, *, plan: CallPlan, inputs: tuple[int, ...]) -> Any:
    size, n = _size(args, dims), len(plan.spec.operands)
    # A tangent has the form of its operand.
    partners = {i: k for k, i in enumerate(inputs, start=n)}
    mapped = [
        dims[i] is not None or (i in partners and dims[partners[i]] is not None) for i in range(n)
    ]
    one_call, forms = mapped_plan(plan, size, mapped)
    all_forms = [*forms, *(forms[i] for i in inputs)]
    given = [_formed(x, d, form, size) for x, d, form in zip(args, dims, all_forms, strict=True)]
    values = tangent_p.bind(*given, plan=one_call, inputs=inputs)
    return values, [0] * len(values)


def _transpose(cotangents: Any, *operands: Any, plan: CallPlan) -> NoReturn:
    del cotangents, operands
    refuse(plan, "linear_transpose", "a model is not linear in general; use jax.vjp")


for primitive in (call_p, sharded_p):
    primitive_jvps[primitive] = _jvp
    primitive_transposes[primitive] = _transpose
    primitive_batchers[primitive] = _batch
primitive_jvps[tangent_p] = _tangent_jvp
primitive_transposes[tangent_p] = _tangent_transpose
primitive_batchers[tangent_p] = _tangent_batch
