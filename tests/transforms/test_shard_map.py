"""Calls inside `shard_map`: each device calls the model on its part."""

import eight
import pytest

PROGRAM = """
    f = wrapped(Both(), ENGINE)

    def loop(f, total):
        def run(x, y):
            def step(x, _):
                sums, values = f(x, y)
                return 0.5 * x + values + 0.01 * total(sums.sum()), None
            return jax.lax.scan(step, x, None, 200)[0]
        return run

    def mapped(f, check, out=P("i")):
        return jax.shard_map(f, mesh=mesh, in_specs=(P("i"), P()), out_specs=out, check_vma=check)

    for check in (False, True):
        both = mapped(f, check, (P("i"), P("i")))
        same("shard_map", both(x, y), in_jax(x, y))
        same("of vmap", mapped(jax.vmap(f, (0, None)), check, (P("i"), P("i")))(x, y), in_jax(x, y))
        same(
            "of grad",
            mapped(lambda x, y: jax.vmap(jax.grad(square(f)), (0, None))(x, y), check)(x, y),
            jax.grad(square(in_jax))(x, y),
        )
        gradients = jax.jit(jax.grad(square(both), BOTH))
        same("grad of", gradients(x, y), jax.grad(square(in_jax), BOTH)(x, y))
        psum = lambda s: jax.lax.psum(s, "i")
        same(
            "a loop with psum", jax.jit(mapped(loop(f, psum), check))(x, y),
            jax.jit(loop(in_jax, lambda s: s))(x, y),
        )
"""


@pytest.mark.parametrize("engine", eight.ENGINES)
def test_calls_and_derivatives_are_those_of_one_device(tmp_path, engine):
    eight.run(tmp_path, engine, PROGRAM)


def test_an_eager_module_runs_on_all_devices_at_once(tmp_path):
    """Each call waits until all devices are in theirs, and returns its own input's result."""
    program = """
        barrier = threading.Barrier(8, timeout=100)

        def meets(x):
            barrier.wait()
            return x * 2

        f = torchcall.TorchModuleWrapper(meets, output_spec=lambda x: x)
        run = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("i"), out_specs=P("i")))
        for k in range(20):
            np.testing.assert_array_equal(run(k * x), k * x * 2)
        pairs = x.reshape(8, 2, 3)
        np.testing.assert_array_equal(jax.pmap(f)(pairs), 2 * pairs)
        assert f.stats()["calls"] == 21 * 8
    """
    eight.run(tmp_path, "eager", program)
