"""The JAX primitives of a call. Their only parameter is the plan, compared by identity."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import numpy as np

from torchcall import _native
from torchcall._call.exported import program_of
from torchcall._call.meshes import aligned, results
from torchcall._call.plan import CallPlan
from torchcall._targets import EXPORTED
from torchcall._undocumented import of_jax
from torchcall._undocumented.of_jax import (
    LoweringRuleContext,
    Primitive,
    ShapedArray,
    register_lowering,
)

call_p = Primitive("torchcall")
call_p.multiple_results = True
# A call whose wrapper has a sharding rule. `partition` lowers it.
sharded_p = Primitive("torchcall_sharded")
sharded_p.multiple_results = True
for _primitive in (call_p, sharded_p):
    of_jax.check_nans(_primitive, lambda plan: f"torchcall: {plan.model_name}")


def bind(plan: CallPlan, operands: list[Any]) -> list[jax.Array]:
    """Adds one call of `plan` to the program being traced, or runs it."""
    # With x64 off, a 64-bit array that was made with x64 on has the narrower dtype in a program.
    operands = [
        operand if operand.dtype == dtype else jax.lax.convert_element_type(operand, dtype)
        for operand, dtype in zip(operands, plan.operand_dtypes, strict=True)
    ]
    return call(plan, operands)


def call(plan: CallPlan, operands: Sequence[Any]) -> list[jax.Array]:
    """`bind` of operands that have the plan's dtypes."""
    primitive = call_p if plan.sharding is None else sharded_p
    return primitive.bind(*aligned(operands), plan=plan)


def compiled(plan: CallPlan) -> Callable[..., list[jax.Array]]:
    """The function that runs `plan` outside any program."""

    def torchcall(*operands: Any) -> list[jax.Array]:
        return bind(plan, list(operands))

    # jax_debug_nans names the function in its error.
    torchcall.__name__ = torchcall.__qualname__ = f"torchcall: {plan.model_name}"
    of_jax.mark_as_primitive(torchcall)
    return jax.jit(torchcall)


@sharded_p.def_impl
@call_p.def_impl
def _impl(*operands: Any, plan: CallPlan) -> list[jax.Array]:
    with jax.disable_jit(False):
        return plan(*operands)


@call_p.def_abstract_eval
def _abstract_eval(*operands: Any, plan: CallPlan) -> list[ShapedArray]:
    return results(plan.outputs, operands)


@sharded_p.def_abstract_eval
def _sharded_abstract_eval(*operands: Any, plan: CallPlan) -> list[ShapedArray]:
    assert plan.sharding is not None
    factors = plan.sharding.factors
    return results(
        plan.outputs, operands, factors.all_operands(plan.spec.loops), factors.all_outputs()
    )


def _lowering_cpu(ctx: LoweringRuleContext, *operands: Any, plan: CallPlan) -> Any:
    if plan.requires_graph:
        refuse(
            plan,
            "cuda_graph='require' in a program for the CPU",
            'pass cuda_graph="auto", which uses a CUDA graph only on CUDA devices',
        )
    return _lower(ctx, *operands, plan=plan, kind="cpu", platform="cpu")


def _lowering_cuda(ctx: LoweringRuleContext, *operands: Any, plan: CallPlan) -> Any:
    obstacle = _native.prepare_cuda()
    if obstacle is not None:
        refuse(
            plan,
            f"a program for CUDA ({obstacle})",
            "install a torch with CUDA, or run the program on the CPU",
        )
    return _lower(ctx, *operands, plan=plan, kind="cuda", platform="CUDA")


def _lower(
    ctx: LoweringRuleContext, *operands: Any, plan: CallPlan, kind: str, platform: str
) -> Any:
    if plan.device not in (None, kind):
        refuse(
            plan,
            f"a package compiled for {plan.device} in a program for {kind}",
            f'compile the model again with torchcall.compile(..., device="{kind}")',
        )
    if of_jax.is_for_export(ctx):
        # The program outlives this process: it holds no registration, and needs none.
        rule = jax.ffi.ffi_lowering(EXPORTED)
        return rule(ctx, *operands, program=program_of(plan))
    _native.register_target(platform)
    # XLA's executable shares ownership of the plan once it is instantiated. Until then, and as long
    # as JAX may compile this module again, the module holds the registration.
    registration = plan.register()
    of_jax.add_keepalive(ctx, registration)
    rule = jax.ffi.ffi_lowering(_native.TARGET)
    return rule(
        ctx, *operands, plan=np.int64(registration.id), ordinal=np.int64(registration.ordinal)
    )


def _lowering_elsewhere(ctx: LoweringRuleContext, *_: Any, plan: CallPlan) -> NoReturn:
    refuse(plan, f"platform {of_jax.platforms(ctx)}", "run the program on the CPU or a CUDA device")


register_lowering(call_p, _lowering_cpu, platform="cpu")
register_lowering(call_p, _lowering_cuda, platform="cuda")
register_lowering(call_p, _lowering_elsewhere)


def refuse(plan: CallPlan, what: str, instead: str) -> NoReturn:
    raise NotImplementedError(
        f"torchcall: {plan.model_name}: {what} is not supported by this version; {instead}"
    )
