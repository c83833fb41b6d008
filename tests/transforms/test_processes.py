"""Calls on a mesh of two processes that `jax.distributed` joins, and an example of one."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "replica_exchange.py"
TIMEOUT = 300  # s

PROGRAM = """
    import sys
    import jax, jax.numpy as jnp, numpy as np, torch
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    import torchcall

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    port, rank = sys.argv[1:]
    jax.distributed.initialize(f"localhost:{port}", 2, int(rank), initialization_timeout=60)
    assert (jax.process_count(), jax.device_count(), jax.local_device_count()) == (2, 2, 1)

    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (x * y.exp()).sum(-1), x.sin() * y

    def in_jax(x, y):
        return (x * jnp.exp(y)).sum(-1), jnp.sin(x) * y

    mesh = Mesh(np.array(jax.devices()), ("i",))
    x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    y = np.array([0.5, 1.0, -1.0], np.float32)

    def placed(array, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    xs, ys = placed(x, P("i")), placed(y, P())
    whole = jax.jit(lambda out: out, out_shardings=NamedSharding(mesh, P()))

    def same(name, found, expected):
        for a, b in zip(jax.tree.leaves(whole(found)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)

    def square(f):
        return lambda x, y: sum((out**2).sum() for out in f(x, y))

    def loop(f, total):
        def run(x, y):
            step = lambda x, _: (0.5 * x + f(x, y)[1] + 0.01 * total(f(x, y)[0].sum()), None)
            return jax.lax.scan(step, x, None, 50)[0]
        return run

    module = torch.jit.script(Both())
    for rule in (None, "b i, i -> b, b i"):
        f = torchcall.TorchModuleWrapper(module, sharding_rule=rule)
        same("jit", jax.jit(f)(xs, ys), in_jax(x, y))
        gradients = jax.grad(square(f), (0, 1))
        same("grad", jax.jit(gradients)(xs, ys), jax.grad(square(in_jax), (0, 1))(x, y))
        psum = loop(f, lambda s: jax.lax.psum(s, "i"))
        mapped = jax.shard_map(psum, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
        same("a loop with psum", jax.jit(mapped)(xs, ys), jax.jit(loop(in_jax, lambda s: s))(x, y))
    text = jax.jit(f).lower(xs, ys).compile().as_text()
    assert "all-gather" not in text
    print("done")
"""


@pytest.mark.slow  # two processes import torch and JAX
def test_two_processes_share_calls(tmp_path):
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(PROGRAM))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "JAX_COMPILATION_CACHE_DIR": ""}
    pair = [
        subprocess.Popen(
            [sys.executable, file, port, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in pair:
            out, error = process.communicate(timeout=TIMEOUT)
            assert process.returncode == 0, error
            assert out.endswith("done\n")
    finally:
        for process in pair:
            process.kill()


@pytest.mark.slow  # three processes
def test_replica_exchange_is_the_same_in_one_process_and_in_two(tmp_path):
    found = []
    for processes in ("1", "2"):
        path = tmp_path / f"{processes}.npz"
        done = subprocess.run(
            [sys.executable, EXAMPLE, "--processes", processes, "--rounds", "60", "--output", path],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=2 * TIMEOUT,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(" of 30\n") == 7
        found.append(np.load(path))
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)

    # Half of the rounds are left out: the cluster starts cold.
    record = {name: found[0][name][30:] for name in ("kinetic", "energies", "accepted", "tried")}
    temperatures = np.geomspace(10, 30, 8)
    # 39 degrees of freedom: a mean over 8 × 30 rounds has a standard deviation of 1.5 %.
    ratio = (record["kinetic"] / temperatures).mean()
    np.testing.assert_allclose(ratio, 1, atol=0.06)
    mean = record["energies"].mean(0)
    # 33 harmonic modes and a soft shell: the slope is at least 33/2 k, and less than twice that.
    slope = np.polyfit(temperatures, mean, 1)[0] / 8.617e-5
    assert 14 < slope < 40
    rate = record["accepted"].sum() / record["tried"].sum()
    assert 0.3 < rate < 0.9
    assert not (record["accepted"] & ~record["tried"]).any()
