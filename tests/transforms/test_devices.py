"""Calls on several devices: `shard_map`, `pmap`, sharded arrays, explicit shardings."""

from pathlib import Path

import pytest
from models import run_python

PROGRAM = """
    import sys
    sys.path.insert(0, "{here}")
    import jax, jax.numpy as jnp, numpy as np, torch
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from twins import wrapped

    ENGINE = "{engine}"
    assert len(jax.devices()) == 8

    class Both(torch.nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (x * y.exp()).sum(-1), x.sin() * y

    f = wrapped(Both(), ENGINE)
    def in_jax(x, y):
        return (x * jnp.exp(y)).sum(-1), jnp.sin(x) * y

    mesh = Mesh(np.array(jax.devices()), ("i",))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), jnp.float32)
    y = jnp.asarray([0.5, 1.0, -1.0], jnp.float32)

    def same(name, got, expected):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)

    def square(f):
        return lambda x, y: sum((out**2).sum() for out in f(x, y))

    def loop(f, total):
        def run(x, y):
            def step(x, _):
                sums, values = f(x, y)
                return 0.5 * x + values + 0.01 * total(sums.sum()), None
            return jax.lax.scan(step, x, None, 200)[0]
        return run

    def mapped(f, check, out=P("i")):
        return jax.shard_map(
            f, mesh=mesh, in_specs=(P("i"), P()), out_specs=out, check_vma=check
        )

    for check in (False, True):
        both = mapped(f, check, (P("i"), P("i")))
        same("shard_map", both(x, y), in_jax(x, y))
        same("of vmap", mapped(jax.vmap(f, (0, None)), check, (P("i"), P("i")))(x, y), in_jax(x, y))
        same(
            "of grad",
            mapped(lambda x, y: jax.vmap(jax.grad(square(f)), (0, None))(x, y), check)(x, y),
            jax.grad(square(in_jax))(x, y),
        )
        same(
            "grad of", jax.jit(jax.grad(square(both), (0, 1)))(x, y),
            jax.grad(square(in_jax), (0, 1))(x, y),
        )
        psum = lambda s: jax.lax.psum(s, "i")
        same(
            "a loop with psum", jax.jit(mapped(loop(f, psum), check))(x, y),
            jax.jit(loop(in_jax, lambda s: s))(x, y),
        )

    split, whole = NamedSharding(mesh, P("i")), NamedSharding(mesh, P())
    xs, ys = jax.device_put(x, split), jax.device_put(y, whole)
    same("sharded arguments", f(xs, ys), in_jax(x, y))
    same("sharded, jit", jax.jit(f)(xs, ys), in_jax(x, y))
    same("sharded results", jax.jit(f, out_shardings=split)(xs, ys), in_jax(x, y))
    limit = jax.lax.with_sharding_constraint
    same("a constraint", jax.jit(lambda x, y: f(limit(x, split), y))(x, ys), in_jax(x, y))
    both = (0, 1)
    same("grad", jax.jit(jax.grad(square(f), both))(xs, ys), jax.grad(square(in_jax), both)(x, y))
    same("vmap", jax.jit(jax.vmap(f, (0, None)))(xs, ys), in_jax(x, y))
    pairs = x.reshape(8, 2, 3)
    same("pmap", jax.pmap(f, in_axes=(0, None))(pairs, y), in_jax(pairs, y))
    explicit = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        same("explicit", jax.jit(f)(jax.device_put(x, P("i")), y), in_jax(x, y))
    for device in jax.devices()[:3]:
        out = jax.jit(f)(jax.device_put(x, device), jax.device_put(y, device))
        assert out[0].devices() == {{device}}
    print("done")
"""


@pytest.mark.parametrize("engine", ["TorchScript", pytest.param("eager", marks=pytest.mark.slow)])
def test_calls_on_several_devices_are_those_of_one(tmp_path, engine):
    program = PROGRAM.format(engine=engine, here=Path(__file__).parent)
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert run_python(tmp_path, program, **flags).stdout == "done\n"
