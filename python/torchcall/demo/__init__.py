"""`python -m torchcall demo`: TorchScript molecular dynamics in one jitted loop."""

from torchcall.demo._cli import main

__all__ = ["main"]
