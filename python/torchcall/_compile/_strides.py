"""Strides of indices along loops, without sympy's general simplification.

torch's C++ generator finds the stride of each index along each loop by `sympy.simplify`, an eighth
of the processor time of a MACE compilation. Nearly all indices are linear in the loop's variable.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import sympy
from torch._inductor.codegen import cpp

_NAME = "stride_at_vec_range"


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
    own: Any = getattr(cpp, _NAME, None)
    if own is None:  # a torch that names it differently
        yield
        return

    def stride(index: Any, var: sympy.Symbol, *length: Any, **more: Any) -> Any:
        found = linear_stride(index, var)
        return own(index, var, *length, **more) if found is None else found

    setattr(cpp, _NAME, stride)
    try:
        yield
    finally:
        setattr(cpp, _NAME, own)
