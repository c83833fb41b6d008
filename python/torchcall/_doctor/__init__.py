"""The report of `torchcall doctor`: one module per part, each examined on its own."""

from torchcall._doctor.run import doctor

__all__ = ["doctor"]
