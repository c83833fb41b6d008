"""CUDA graphs of calls."""
