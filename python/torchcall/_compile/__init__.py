"""From a module to a package: gradients, tracing, export, compilation, checks, cache."""

from ._errors import CompileError
from ._public import compile

__all__ = ["CompileError", "compile"]
