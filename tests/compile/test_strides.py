"""Strides of indices are those that torch computes."""

import pytest
import sympy
from torch._inductor.codegen import cpp
from torch.utils._sympy.functions import FloorDiv, ModularIndexing
from torch.utils._sympy.symbol import SymT, make_symbol

from torchcall._compile._strides import linear_stride, linear_strides

x, y, size = (make_symbol(kind, 0, integer=True) for kind in (SymT.XBLOCK, SymT.TMP, SymT.SIZE))
LINEAR = [sympy.Integer(7), x, 3 * x + y, 12 * y + FloorDiv(y, 4), size * y - 2 * x + 5]
OTHERS = [
    size * x,
    x * x,
    3 * (x + y) * size,
    FloorDiv(x, 4) + y,
    8 * ModularIndexing(x, 1, 16) + x,
    sympy.Lt(x, size),
]


@pytest.mark.parametrize("index", LINEAR, ids=str)
def test_linear_indices_are_read_off(index):
    assert linear_stride(index, x) == cpp.stride_at_vec_range(index, x, 8)


@pytest.mark.parametrize("index", OTHERS, ids=str)
def test_other_indices_are_torchs(index):
    assert linear_stride(index, x) is None


def test_torchs_function_is_restored():
    own = cpp.stride_at_vec_range
    with linear_strides():
        assert cpp.stride_at_vec_range is not own
        assert cpp.stride_at_vec_range(x * 3, x, 8) == 3
        assert cpp.stride_at_vec_range(FloorDiv(x, 16), x, 8) == own(FloorDiv(x, 16), x, 8)
    assert cpp.stride_at_vec_range is own
