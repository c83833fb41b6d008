"""Traces a potential into a graph of operators, and finds the shapes that it is valid for."""

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from torchcall._compile._copy import scripted_parts
from torchcall._compile._errors import CompileError, SpecialisedError
from torchcall._compile._program import as_program, trace_fakes
from torchcall._undocumented.of_compiler import LocalSource
from torchcall._undocumented.of_torch import FakeTensorMode
from torchcall.mliap._compile._derivative import PotentialDerivative
from torchcall.mliap._compile._form import INPUTS, OUTPUTS, B, E, Graph, N, Sizes
from torchcall.mliap._compile._gradients import PotentialModule
from torchcall.mliap._compile._simplify import simplify, written_inputs

_LARGEST = 100_000  # largest excluded size of an axis that is compared


@dataclass(frozen=True)
class Traced:
    """A graph of operators.

    Attributes:
        module: maps the inputs, in order, to the outputs, in order.
        excluded: sizes for which the module may execute other operators than the graph's; they
            must be compared. Empty for static shapes.
    """

    module: torch.fx.GraphModule
    excluded: list[Sizes]


def trace(
    potential: PotentialModule,
    example: Graph,
    *,
    dynamic: bool,
    derivative: PotentialDerivative | None = None,
) -> Traced:
    """Traces the potential, or its derivative, with fake tensors.

    Args:
        potential: a potential whose `inspect` has run.
        example: only its shapes matter. If `dynamic`, those of the three axes differ from one
            another and from all small numbers, so that no size is mistaken for another.
        dynamic: whether numbers of atoms, edges and systems are symbols.
        derivative: what to trace instead of the potential.

    Raises:
        SpecialisedError: the module fixes a size that should be a symbol.
        CompileError: it cannot be traced.
    """
    env = ShapeEnv()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=env)
    symbolic, fixed = DimDynamic.DUCK, DimDynamic.STATIC
    fakes = []
    inputs: list[Any] = [(key, form, example[key]) for key, form in INPUTS.items()]
    if derivative is not None:
        given = derivative.given(example)[len(INPUTS) :]
        inputs += [
            (f"cotangent of {key}", OUTPUTS[key], value)
            for key, value in zip(potential.outputs(), given, strict=True)
        ]
    for key, form, value in inputs:
        dims = [symbolic if dynamic and isinstance(n, str) else fixed for n in form]
        context = StatelessSymbolicContext(dynamic_sizes=dims)
        fakes.append(mode.from_tensor(value, symbolic_context=context, source=LocalSource(key)))
    if derivative is None:
        module = trace_fakes(potential.name, "traced", potential.flat, mode, fakes)
    else:
        stage = "differentiated twice"
        module = trace_fakes(potential.name, stage, derivative.product, mode, fakes)
    module.eval()
    if written := [inputs[k][0] for k in written_inputs(module)]:
        raise CompileError(
            f"torchcall: {potential.name}: compile: expected a module that does not change its "
            f"input, got one that writes to {', '.join(written)} for some shapes only; give it "
            "copies (.clone())"
        )
    simplify(module)
    if not dynamic:
        return Traced(module, [])
    try:
        return Traced(module, _excluded_sizes(env, fakes))
    except SpecialisedError as error:
        if not (parts := scripted_parts(potential.module)):
            raise
        more = f" and {len(parts) - 1} more" if len(parts) > 1 else ""
        raise SpecialisedError(
            f"{error}; the module has parts in TorchScript ({parts[0]}{more}), which converts "
            "symbolic sizes to constants"
        ) from error


def _excluded_sizes(env: ShapeEnv, fakes: list[torch.Tensor]) -> list[Sizes]:
    """Sizes that the trace excluded, one per guard.

    A comparison with the result "not equal" excludes a single size, which can be compared
    separately. Any other guard excludes a range of sizes, for which the graph may be wrong.

    Raises:
        SpecialisedError: an axis became a constant, or a range of sizes is excluded.
    """
    by_key = dict(zip(INPUTS, fakes, strict=False))  # cotangents have no other axes
    axes = {
        N: by_key["pos"].shape[0],
        E: by_key["cell_offsets"].shape[0],
        B: by_key["cell"].shape[0],
    }
    symbols = {name: _expression(size) for name, size in axes.items()}
    for name, symbol in symbols.items():
        if not isinstance(symbol, sympy.Symbol):
            where = next((f" {g.sloc}" for g in env.guards if isinstance(g.expr, sympy.Eq)), "")
            raise SpecialisedError(
                f"the number of {_AXIS_NAMES[name]} became the constant {symbol}{where}; len() and "
                "int() make a size constant, .size() and .shape do not"
            )
    names = {symbol: name for name, symbol in symbols.items()}
    result = []
    for guard in env.guards:
        expression: Any = guard.expr
        found = _violation(expression, names) if isinstance(expression, sympy.Ne) else None
        if found is None:
            text = str(expression.subs({s: sympy.Symbol(n) for s, n in names.items()}))
            raise SpecialisedError(f"the module branches on {text} {guard.sloc}")
        result.append(found)
    return result


_AXIS_NAMES = {N: "atoms", E: "edges", B: "systems"}


def _expression(size: Any) -> Any:
    """The symbol or constant of a size."""
    if not isinstance(size, torch.SymInt):
        return size
    node: Any = size.node
    return node.expr


def _violation(unequal: Any, names: dict[Any, str]) -> Sizes | None:
    """The size of one axis for which `unequal` is false, if there is exactly one such size."""
    symbols = unequal.free_symbols
    if len(symbols) != 1 or not symbols <= set(names):
        return None
    (symbol,) = symbols
    difference = sympy.expand(unequal.lhs - unequal.rhs)
    slope = difference.coeff(symbol, 1)
    rest = difference - slope * symbol
    if slope == 0 or rest.free_symbols:
        return None
    size = -rest / slope
    if not size.is_Integer or not 2 <= size <= _LARGEST:
        return None
    return {names[symbol]: int(size)}


def program_of(traced: Traced, example: Graph, outputs: list[str]) -> torch.fx.GraphModule:
    """The graph as a function of a dict, as `build` takes it.

    It is not exported: torch's exporter would trace it twice more, a sixth of the processor time of
    a MACE compilation, and its checks of sizes are those of `trace` and `build`.

    Args:
        traced: its module is changed, and the compiler changes it again.
        example: a graph of the sizes with which it was traced.
        outputs: the names of its outputs, in order.
    """
    arguments = ({key: example[key] for key in INPUTS},)
    return as_program(traced.module, ["input"], arguments, dict.fromkeys(outputs, 0))
