"""Compiled sums of any number of elements."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torchcall._undocumented.of_compiler import CppKernel, V

_CHOICE = "need_use_acc_helper"
_CHECKS = ("check_lt", "check_leq")


@contextlib.contextmanager
def sums_of_any_size() -> Iterator[None]:
    """Lets torch's C++ generator choose how to add numbers without restricting how many there are.

    torch 2.11 chooses by the example's size, and records that only sizes on the same side of 4096
    are valid. Both ways are right for every size; they differ in rounding.
    """
    own: Any = getattr(CppKernel, _CHOICE, None)
    if own is None:  # a torch that names it differently
        yield
        return

    def choice(kernel: Any, *args: Any, **more: Any) -> Any:
        sizes = vars(V.graph.sizevars)
        sizes.update({name: lambda *_: None for name in _CHECKS})  # instead of the methods
        try:
            return own(kernel, *args, **more)
        finally:
            for name in _CHECKS:
                del sizes[name]

    setattr(CppKernel, _CHOICE, choice)
    try:
        yield
    finally:
        setattr(CppKernel, _CHOICE, own)
