"""The neighbour list as gathers and scatters, for platforms other than the CPU."""

from torchcall.mliap._neighbors.in_jax.update import update, with_bins, with_larger_bins

__all__ = ["update", "with_bins", "with_larger_bins"]
