"""Plans made from other plans: vector-Jacobian products, and calls with mapped axes."""

from collections.abc import Sequence
from typing import Literal

from torchcall._call.narrowing import Axis
from torchcall._call.plan import CallPlan, Operand, PlanSpec
from torchcall._call.sharding import Factors, Sharding
from torchcall._call.tree import NONE, TENSOR, TUPLE, Node

_VMAP_METHODS = {
    "eager": ("sequential", "expand_dims", "broadcast_all", "torch"),
    "TorchScript": ("sequential", "expand_dims", "broadcast_all"),
    "AOTInductor": ("sequential",),
}
_FLOATS = ("float", "bfloat", "complex")


def check_vmap_method(method: object, engine: str) -> None:
    """Raises a ValueError for a method that an engine does not have."""
    possible = _VMAP_METHODS[engine]
    if method not in possible:
        raise ValueError(
            f"torchcall: vmap_method: expected {' or '.join(map(repr, possible))} for a model of "
            f"the engine {engine}, got {method!r}"
        )


def differentiable(array: Operand) -> bool:
    """Whether torch can differentiate with respect to this operand or output."""
    return all(name.startswith(_FLOATS) for name in (array.dtype, array.cast or array.dtype))


def vjp_plan(
    plan: CallPlan,
    inputs: Sequence[int],
    outputs: Sequence[int],
    cotangents_mapped: Sequence[Sequence[bool]] | None = None,
    *,
    keeps_outputs: bool = False,
) -> CallPlan:
    """The plan of the gradients of `Σ ⟨cotangent, output⟩`.

    Its operands are the plan's and one cotangent per entry of `outputs`. Its outputs are the
    gradients with respect to the operands `inputs`, one for each element of all mapped axes.

    Args:
        plan: the function to differentiate.
        inputs: the operands with respect to which, increasing.
        outputs: the outputs that have a cotangent, increasing.
        cotangents_mapped: per mapped axis of the plan, and per cotangent, whether it has this axis;
            None: all of them, as outputs do.
        keeps_outputs: whether the plan's own outputs come before the gradients.

    Raises:
        NotImplementedError: the engine does not have these gradients.
    """
    require_gradients(plan, inputs)

    def sharding(of_plan: Sharding) -> Sharding:
        return of_plan.derived(
            of_plan.factors.of_gradients(inputs, outputs, keeps_outputs=keeps_outputs),
            lambda part, _: vjp_plan(
                part, inputs, outputs, cotangents_mapped, keeps_outputs=keeps_outputs
            ),
        )

    key = "vjp", tuple(inputs), tuple(outputs), str(cotangents_mapped), keeps_outputs
    return plan.derived(
        key, lambda spec: _vjp(spec, inputs, outputs, cotangents_mapped, keeps_outputs), sharding
    )


def _vjp(
    spec: PlanSpec,
    inputs: Sequence[int],
    outputs: Sequence[int],
    cotangents_mapped: Sequence[Sequence[bool]] | None,
    keeps_outputs: bool,
) -> PlanSpec:
    cotangents = [
        Operand(f"cotangent of {out.name}", out.dtype, out.shape, narrow=out.narrow)
        for out in (spec.outputs[j] for j in outputs)
    ]
    gradients = [
        Operand(f"gradient of {x.name}", x.dtype, x.shape, narrow=_leading(x))
        for x in (spec.operands[i] for i in inputs)
    ]
    all_mapped = [[True] * len(cotangents)] * len(spec.loops)
    derivatives = [*spec.derivatives, (list(inputs), list(outputs), keeps_outputs)]
    runner = spec.eager_runner
    if spec.derivative is not None:
        dtypes = {
            _output_of(spec, result): dtype for result, dtype, _ in spec.derivative.cotangents
        }
        cotangents = [
            cotangent._replace(cast=dtypes[j])
            for cotangent, j in zip(cotangents, outputs, strict=True)
        ]
        spec = _of_program(spec, inputs, outputs, keeps_outputs)
    return spec._replace(
        operands=[*spec.operands, *cotangents],
        outputs=[*(spec.outputs if keeps_outputs else ()), *gradients],
        loops=[
            (size, [*mapped, *more])
            for (size, mapped), more in zip(
                spec.loops, cotangents_mapped or all_mapped, strict=True
            )
        ],
        derivatives=derivatives,
        eager_runner=None if runner is None else runner.derivative(cotangents, derivatives[-1]),
        cuda_graph="off" if spec.cuda_graph == "auto" else spec.cuda_graph,
        reuses_last=False,
        gradient_of=(),
    )


def require_gradients(plan: CallPlan, inputs: Sequence[int]) -> None:
    """Raises a NotImplementedError if the engine has no gradients with respect to these operands.

    The message says what to do.
    """
    spec = plan.spec
    if spec.no_derivatives:
        raise NotImplementedError(
            f"torchcall: {plan.model_name}: cannot be differentiated: {spec.no_derivatives}"
        )
    for i in inputs:
        if spec.derivative is not None and i not in spec.derivative.gradients:
            raise NotImplementedError(
                f"torchcall: {plan.model_name}: {spec.operands[i].name}: expected an input with "
                "respect to which the package has gradients, got another; compile it again with "
                "gradients=True, or apply jax.lax.stop_gradient to this input"
            )


def _output_of(spec: PlanSpec, result: int) -> int | None:
    """The plan's output that is this entry of the model's flat results; None: it is not used."""
    kind, output = spec.results[1 + result]
    return int(output) if kind == TENSOR and isinstance(output, int) else None


def _of_program(
    spec: PlanSpec, inputs: Sequence[int], outputs: Sequence[int], keeps_outputs: bool
) -> PlanSpec:
    """The arguments and results of the engine's derivative, the model's being flat tuples."""
    program = spec.derivative
    assert program is not None
    arguments, results = spec.arguments[1:], spec.results[1:]
    given = {j: len(spec.operands) + k for k, j in enumerate(outputs)}
    for result, _, zeros in program.cotangents:
        j = _output_of(spec, result)
        arguments += [(TENSOR, given[j])] if j in given else zeros
    wanted: list[Node] = results if keeps_outputs else [(NONE, None)] * len(results)
    first = len(spec.outputs) if keeps_outputs else 0
    gradients = {i: first + k for k, i in enumerate(inputs)}
    wanted += [
        (TENSOR, gradients[i]) if i in gradients else (NONE, None) for i in program.gradients
    ]
    n_arguments = len(spec.arguments) - 1 + len(program.cotangents)
    return spec._replace(
        arguments=[(TUPLE, n_arguments), *arguments],
        results=[(TUPLE, len(wanted)), *wanted],
        selects_outputs=True,  # gradients are cast to the operands' dtypes
        no_derivatives=program.no_more,
        derivative=None,
    )


def _leading(operand: Operand) -> Axis | None:
    if operand.narrow is not None and operand.narrow.axis != 0:
        raise NotImplementedError(
            f"{operand.name}: a derivative with respect to an array that is narrowed along axis "
            f"{operand.narrow.axis}"
        )
    return operand.narrow


# What an operand of a mapped call must look like: its mapped axis in front, as it is, with an axis
# of size 1 in front, or repeated along the mapped axis.
Form = Literal["mapped", "as it is", "one", "repeated"]
_UNMAPPED: dict[str, Form] = {"expand_dims": "one", "broadcast_all": "repeated"}


def mapped_plan(plan: CallPlan, size: int, mapped: Sequence[bool]) -> tuple[CallPlan, list[Form]]:
    """The plan of a call with one mapped axis, and the form of each operand.

    Args:
        plan: the plan of one element.
        size: of the axis.
        mapped: per operand, whether it has the axis. Outputs have it, as their axis 0.
    """
    spec = plan.spec
    method = "sequential" if spec.lengths or spec.index_checks else spec.vmap_method
    n = len(spec.parameters)
    if n > 0 and method in _UNMAPPED and not _fixes_parameters(spec, mapped):
        method = "sequential"
    unmapped = _UNMAPPED.get(method, "as it is")
    forms: list[Form] = ["mapped" if has else unmapped for has in mapped]
    forms[:n] = ["mapped" if has else "as it is" for has in mapped[:n]]

    def sharding(of_plan: Sharding) -> Sharding:
        factors = of_plan.factors
        new = factors.new_factor()
        return of_plan.derived(
            factors.with_loop(new)
            if method == "sequential"
            else _wider_factors(factors, new, forms),
            lambda part, parts: mapped_plan(part, size // parts.get(new, 1), mapped)[0],
        )

    if method == "sequential":
        return plan.derived(
            ("loop", size, tuple(mapped)), lambda spec: _loop(spec, size, mapped), sharding
        ), forms
    # Gradients are wanted per element, so each needs its own operand; and cotangents fit outputs.
    n_cotangents = sum(len(outputs) for _, outputs, _ in spec.derivatives)
    cotangents = range(len(forms) - n_cotangents, len(forms))
    for i in {*cotangents, *(i for inputs, _, _ in spec.derivatives for i in inputs)}:
        forms[i] = "mapped" if mapped[i] else "repeated"
    key = "wider", size, tuple(forms)
    # The option promises that the model takes a further axis, so errors of this call name it.
    option = f" (vmap_method={method!r})"
    name = plan.model_name if plan.model_name.endswith(option) else plan.model_name + option
    return plan.derived(key, lambda spec: _wider(spec, size, forms), sharding, name), forms


def _fixes_parameters(spec: PlanSpec, mapped: Sequence[bool]) -> bool:
    """Whether all elements of an axis use the same parameters, so that one call serves them all.

    Gradients by parameters are wanted per element. A loop inside does not get a further axis.
    """
    n = len(spec.parameters)
    differentiated = any(i < n for inputs, _, _ in spec.derivatives for i in inputs)
    return not (any(mapped[:n]) or differentiated or spec.loops)


def _loop(spec: PlanSpec, size: int, mapped: Sequence[bool]) -> PlanSpec:
    return spec._replace(loops=[(size, list(mapped)), *spec.loops], reuses_last=False)


def _wider(spec: PlanSpec, size: int, forms: Sequence[Form]) -> PlanSpec:
    leading = {"mapped": [size], "repeated": [size], "one": [1], "as it is": []}
    operands = [
        operand._replace(shape=[*leading[form], *operand.shape])
        for operand, form in zip(spec.operands, forms, strict=True)
    ]
    runner = spec.eager_runner
    if runner is not None:
        has_axis = [form != "as it is" for form in forms]
        runner = runner.mapped(
            [operand.shape for operand in operands], has_axis, spec.vmap_method == "torch"
        )
    return spec._replace(
        operands=operands,
        outputs=[output._replace(shape=[size, *output.shape]) for output in spec.outputs],
        eager_runner=runner,
        reuses_last=False,
    )


def _wider_factors(factors: Factors, new: str, forms: Sequence[Form]) -> Factors:
    leading = {"mapped": (new,), "repeated": (new,), "one": (None,), "as it is": ()}
    operands = [(*leading[form], *own) for form, own in zip(forms, factors.operands, strict=True)]
    return Factors(operands, [(new, *own) for own in factors.outputs], factors.loops)
