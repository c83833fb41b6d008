"""Programs on eight virtual CPU devices, each in a process of its own."""

import textwrap
from pathlib import Path

import pytest
from models import run_python

HERE = Path(__file__).parent
ENGINES = ["TorchScript", pytest.param("eager", marks=pytest.mark.slow)]

START = """
import re, sys, threading
sys.path.insert(0, {here!r})
import jax, jax.numpy as jnp, numpy as np, torch
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
import torchcall
from twins import wrapped

ENGINE = {engine!r}
assert len(jax.devices()) == 8

class Both(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x * y.exp()).sum(-1), x.sin() * y

def in_jax(x, y):
    return (x * jnp.exp(y)).sum(-1), jnp.sin(x) * y

mesh = Mesh(np.array(jax.devices()), ("i",))
split, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
y = jnp.asarray([0.5, 1.0, -1.0], jnp.float32)
xs, ys = jax.device_put(x, split), jax.device_put(y, whole)

def same(name, got, expected):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)

def square(f):
    return lambda x, y: sum((out**2).sum() for out in f(x, y))

BOTH = (0, 1)  # arguments
"""


def run(folder: Path, engine: str, program: str) -> None:
    """Runs a program after `START`; its last line must be reached."""
    text = START.format(here=str(HERE), engine=engine) + textwrap.dedent(program)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert run_python(folder, text + "\nprint('done')\n", **flags).stdout == "done\n"
