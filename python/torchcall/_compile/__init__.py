"""From any module to a package: export, compilation, comparison with the module, cache."""

from torchcall._compile._errors import CompileError
from torchcall._compile._public import compile

__all__ = ["CompileError", "compile"]
