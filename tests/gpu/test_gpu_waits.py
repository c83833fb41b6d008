"""What a simulation's loop asks of the driver, where tests/standin/cuda plays that and keeps a log.

On a GPU `benchmarks/gpu_transfers.py` counts the same with torch's profiler.
"""

import ctypes
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
import torch
from gpu_models import PLAYED
from gpu_systems import POTENTIALS, SEARCH, graph_of, systems

from torchcall.mliap import TorchMliap, energy_and_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not PLAYED, reason="only a driver that is played tells what it was asked"),
]


class Log:
    """What the driver was asked since the block was entered: kinds and names, counted."""

    def __enter__(self):
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.cuda.standin_cuda_log.restype = ctypes.c_size_t
        self.cuda.standin_cuda_clear_log()
        return self

    def __exit__(self, *_):
        size = self.cuda.standin_cuda_log(None, ctypes.c_size_t(0))
        text = ctypes.create_string_buffer(size)
        size = min(self.cuda.standin_cuda_log(text, ctypes.c_size_t(size)), size)
        lines = [line.split("\t", 1) for line in text.raw[:size].decode().splitlines()]
        self.count = Counter((kind, " ".join(name.split()[:2])) for kind, name in lines)

    def waits(self):
        return sum(n for what, n in self.count.items() if what[0] in ("sync", "unsafe"))

    def copies_to_the_host(self):
        return sum(n for what, n in self.count.items() if what[1] == "copy dtoh")

    def launches(self):
        return sum(n for what, n in self.count.items() if what[0] == "launch")


@pytest.mark.parametrize("engine", ["TorchScript", "eager"])
def test_a_simulations_steps_neither_wait_nor_copy_to_the_host(engine, device):
    module = POTENTIALS["Lennard-Jones"]()
    model = TorchMliap.from_module(
        torch.jit.script(module) if engine == "TorchScript" else module, cutoff=4.5
    )
    positions, cell, pbc, batch = (jax.device_put(a, device) for a in systems())
    neighbors = replace(SEARCH.allocate(positions, cell, pbc, batch), schedule="never")

    def step(_, state):
        r, v, nbrs = state
        out = energy_and_gradients(model, graph_of((r, cell, pbc, batch), nbrs))
        v = v - 0.001 * out.position_gradients
        return r + 0.04 * v, v, nbrs.update(r, cell)

    @jax.jit
    def run(state):
        return jax.lax.fori_loop(0, 20, step, state)

    state = jax.block_until_ready(run((positions, jnp.zeros_like(positions), neighbors)))
    with Log() as log:
        jax.block_until_ready(run(state))
    assert log.launches() == 20
    assert log.waits() <= 1  # XLA's, when a program is through; steps have none
    assert log.copies_to_the_host() == 0
    with Log() as log:  # that it would have been seen
        float(jnp.abs(state[0]).max())
    assert log.copies_to_the_host() > 0
