"""Compiles a potential into a package: gradients, metadata, checks."""

from torchcall.mliap._compile._public import compile

__all__ = ["compile"]
