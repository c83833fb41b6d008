"""Compiles any module into a package: export, compilation, checks against the module, cache."""

from torchcall._compile._errors import CompileError
from torchcall._compile._public import compile

__all__ = ["CompileError", "compile"]
