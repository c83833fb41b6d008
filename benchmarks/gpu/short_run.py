"""A short run of every path that uses device memory, for memory checkers and other torch halves.

    compute-sanitizer python benchmarks/gpu/short_run.py
    TORCHCALL_TORCH_HALF=path/to/libtorchcall_torch.so python benchmarks/gpu/short_run.py

A scripted and an eager model that use autograd run uncaptured and captured, in a jitted loop and
with changing inputs. Results are compared with a formula. The last line names the torch half.
"""

import argparse
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _common import device_of

import torchcall
from torchcall import _bridge


class Spring(torch.nn.Module):
    """Energy and gradient of x⁴, by autograd."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Differentiates inside."""
        x = x.detach().requires_grad_(True)
        energy = x.pow(4).sum()
        gradient = torch.autograd.grad([energy], [x])[0]
        assert gradient is not None
        return energy.detach(), gradient


def check(engine: str, cuda_graph: str, *, gpu: bool) -> None:
    """Runs one model.

    Raises:
        AssertionError: A result or a count is wrong.
    """
    module = torch.jit.script(Spring()) if engine == "TorchScript" else Spring()
    wrapper = torchcall.TorchModuleWrapper(module, requires_grad=True, cuda_graph=cuda_graph)  # pyright: ignore[reportArgumentType]

    @jax.jit
    def descend(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 4, lambda _, x: x - 0.01 * wrapper(x)[1], x)

    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(8, 3)).astype(np.float32)
        expected = x.astype(np.float64)
        for _ in range(4):
            expected = expected - 0.04 * expected**3
        np.testing.assert_allclose(descend(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
    stats = wrapper.stats()
    assert stats["calls"] == 12, stats
    if gpu and cuda_graph == "auto":
        assert stats["graph_captures"] == 1, stats
        assert stats["graph_replays"] > 0, stats
    else:
        assert stats["graph_replays"] == 0, stats
    print(f"{engine}, cuda_graph={cuda_graph}: as expected; {stats}", flush=True)


def main() -> int:
    """Runs every combination."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args()
    device = device_of(options.device)
    for engine in ("TorchScript", "eager"):
        for cuda_graph in ("off", "auto"):
            check(engine, cuda_graph, gpu=device.is_gpu)
    device.wait()
    half = os.environ.get("TORCHCALL_TORCH_HALF") or "the one that was built here"
    built_for = _bridge.torch_half_version()
    print(
        f"torch half: {half}, built for torch {built_for}; it served torch {torch.__version__} "
        f"on {device.of_jax}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
