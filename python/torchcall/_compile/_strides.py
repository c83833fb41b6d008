"""Strides of indices along loops, without sympy's general simplification.

torch's C++ generator finds the stride of each index along each loop by `sympy.simplify`, an eighth
of the processor time of a MACE compilation. Nearly all indices are linear in the loop's variable.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import sympy

from torchcall._undocumented.of_compiler import STRIDE, found, replaced


def linear_stride(index: Any, variable: sympy.Symbol) -> sympy.Expr | None:
    """The change of `index` when `variable` grows by 1, if that is a number by the terms' form."""
    stride: Any = sympy.Integer(0)
    for term in sympy.Add.make_args(index):
        if variable in term.free_symbols:
            factor, rest = term.as_coeff_mul() if isinstance(term, sympy.Expr) else (0, ())
            if rest != (variable,):
                return None
            stride += factor
    return stride


@contextlib.contextmanager
def linear_strides() -> Iterator[None]:
    """Lets torch's C++ generator read strides off; it computes the others itself."""
    own = found(STRIDE)
    if own is None:  # a torch that names it differently
        yield
        return

    def stride(index: Any, var: sympy.Symbol, *length: Any, **more: Any) -> Any:
        known = linear_stride(index, var)
        return own(index, var, *length, **more) if known is None else known

    with replaced(STRIDE, stride):
        yield
