"""From a module to a package: gradients, tracing, export, compilation, checks, cache."""

from torchcall._compile._errors import CompileError
from torchcall._compile._public import compile

__all__ = ["CompileError", "compile"]
