"""Calls in JAX programs: the transformations that work, and clear errors for the others."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import (
    Counter,
    Linear,
    Scale,
    Spring,
    assert_same,
    double,
    error_of,
    numpy_of,
    run_python,
    shift,
    subtract,
    torch_of,
)
from torch import Tensor

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)


def scripted(function, **options):
    return TorchModuleWrapper(torch.jit.script(function), **options)


def test_eager_call_returns_jax_arrays():
    y = scripted(double)(X)
    assert isinstance(y, jax.Array)
    assert_same(y, 2 * X)


def test_call_works_under_jit_and_nested_jit():
    f = scripted(double)
    inner = jax.jit(lambda x: f(x) + 1)
    assert_same(jax.jit(f)(X), 2 * X)
    assert_same(jax.jit(lambda x: inner(inner(x)) * f(x))(X), (4 * X + 3) * (2 * X))


def test_call_under_scan_equals_a_python_loop():
    f = scripted(Linear())
    module = Linear()

    def body(carry, x):
        y = f(carry + x)
        return y[:, :3] * 0.1, y

    xs = np.random.default_rng(0).standard_normal((20, 2, 3)).astype(np.float32)
    carry, ys = jax.jit(lambda c, xs: jax.lax.scan(body, c, xs))(X, xs)
    eager_carry, eager_ys = torch_of(X), []
    for x in xs:
        y = module(eager_carry + torch_of(x))
        eager_carry = y[:, :3] * 0.1
        eager_ys.append(y)
    np.testing.assert_allclose(carry, numpy_of(eager_carry), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ys, numpy_of(torch.stack(eager_ys)), rtol=1e-5, atol=1e-6)


def test_call_works_in_the_body_and_condition_of_while_loop():
    f, total = scripted(shift), scripted(sums)
    got = jax.jit(lambda x: jax.lax.while_loop(lambda x: total(x) < 100, f, x))(X)
    assert_same(got, X + 15)


def sums(x: Tensor) -> Tensor:
    return x.sum()


def test_call_works_under_fori_loop():
    assert_same(
        jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: scripted(shift)(x), x))(X), X + 7
    )


def test_call_under_cond_and_switch_runs_only_the_chosen_branch():
    f, g = scripted(double), scripted(shift)
    program = jax.jit(lambda p, x: jax.lax.cond(p, f, g, x))
    assert_same(program(True, X), 2 * X)
    assert_same(program(False, X), X + 1)
    assert (f.stats()["calls"], g.stats()["calls"]) == (1, 1)
    switch = jax.jit(lambda i, x: jax.lax.switch(i, [f, g, lambda x: x], x))
    assert_same(switch(1, X), X + 1)
    assert (f.stats()["calls"], g.stats()["calls"]) == (1, 2)


def test_call_works_under_remat_and_inside_a_differentiated_function():
    f = scripted(double)
    assert_same(jax.jit(jax.checkpoint(lambda x: f(x) + 1))(X), 2 * X + 1)

    @jax.checkpoint
    def loss(w):
        return (jnp.sin(w) * f(X)).sum()  # the call does not depend on w

    np.testing.assert_allclose(jax.grad(loss)(0.3), np.cos(0.3) * (2 * X).sum(), rtol=1e-6)


def test_stop_gradient_makes_a_call_constant():
    f = scripted(double)
    got = jax.grad(lambda x: (x * f(jax.lax.stop_gradient(x))).sum())(X)
    assert_same(got, 2 * X)


def test_custom_vjp_may_use_the_gradients_that_a_call_returns():
    f = scripted(Spring(), requires_grad=True)

    @jax.custom_vjp
    def energy(x):
        return f(x)[0]

    energy.defvjp(lambda x: f(x), lambda gradient, ct: (ct * gradient,))
    assert_same(jax.jit(jax.grad(energy))(X), 3 * X)


def test_call_accepts_a_donated_operand():
    f = scripted(double)
    program = jax.jit(lambda x: f(x) + x, donate_argnums=0)
    for _ in range(3):
        x = jnp.asarray(X)
        assert_same(program(x), 3 * X)
        assert x.is_deleted()
    x = jnp.asarray(X)
    assert_same(jax.jit(f, donate_argnums=0)(x), 2 * X)


def test_call_on_a_deleted_array_is_an_error_and_the_next_call_works():
    f = scripted(double)
    x = jnp.asarray(X)
    x.delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        f(x)
    assert_same(f(X), 2 * X)


def test_one_program_may_call_several_models():
    f, g, h = scripted(Scale(2.0)), scripted(Scale(5.0)), scripted(subtract)
    program = jax.jit(lambda x: h(f(x), g(x)) + jax.lax.fori_loop(0, 2, lambda _, x: g(f(x)), x))
    assert_same(program(X), -3 * X + 100 * X)


def test_one_program_may_call_a_wrapper_with_several_shapes():
    f = scripted(double)
    assert_same(jax.jit(lambda x: (f(x), f(x[0]), f(x[:, :1])))(X), (2 * X, 2 * X[0], 2 * X[:, :1]))


def test_operands_may_be_constants_or_computed_values():
    f = scripted(subtract)
    constant = jnp.asarray(X)
    assert_same(jax.jit(lambda x: f(constant, x.T.T * 2))(X), X - 2 * X)


def test_identical_calls_are_merged_and_unused_ones_dropped():
    f = scripted(double)
    assert_same(jax.jit(lambda x: f(x) + f(x))(X), 4 * X)
    assert f.stats()["calls"] == 1
    jax.block_until_ready(jax.jit(lambda x: (f(x), x + 1)[1])(X))
    assert f.stats()["calls"] == 1


def test_tracing_alone_does_not_run_the_model():
    module = torch.jit.script(Counter())
    f = TorchModuleWrapper(module)
    assert jax.eval_shape(f, X) == jax.ShapeDtypeStruct((2, 3), np.float32)
    jax.make_jaxpr(f)(X)
    jax.jit(f).lower(X).compile()
    assert f.stats()["calls"] == 0
    assert module.count.item() == 0


def test_call_works_next_to_python_callbacks():
    f = scripted(double)

    def body(_, x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(lambda v: np.asarray(v) + 1, shape, f(x))

    got = jax.jit(lambda x: jax.lax.fori_loop(0, 10, body, x))(X)
    assert_same(got, X * 1024 + 1023)


def test_call_works_inside_map():
    f = scripted(double)
    assert_same(jax.jit(lambda x: jax.lax.map(f, x))(X), 2 * X)


def test_call_works_with_jit_disabled():
    f = scripted(double)
    with jax.disable_jit():
        assert_same(f(X), 2 * X)
        assert_same(jax.jit(lambda x: f(x) + 1)(X), 2 * X + 1)
        assert_same(jax.lax.fori_loop(0, 2, lambda _, x: f(x), X), 4 * X)


def test_call_works_in_compile_time_evaluation_inside_jit():
    f = scripted(double)

    @jax.jit
    def program(x):
        with jax.ensure_compile_time_eval():
            factor = float(f(np.float32(4)))
        return x * factor

    assert_same(program(X), 8 * X)


def test_call_works_without_array_arguments():
    f = scripted(constant_of)
    assert_same(f(3), np.full(3, 3, np.float32))
    assert_same(jax.jit(lambda x: f(3) + x)(np.float32(1)), np.full(3, 4, np.float32))


def constant_of(n: int) -> Tensor:
    return torch.full([n], float(n))


def test_warmup_makes_the_plan_and_runs_twice():
    f = scripted(double)
    f.warmup(X)
    assert f.stats()["calls"] == 2
    assert f.stats()["plans"] == 1
    assert_same(jax.jit(f)(X), 2 * X)
    assert f.stats()["plans"] == 1


def test_warmup_on_real_data_works_while_a_function_is_traced():
    f = scripted(double)

    @jax.jit
    def program(x):
        f.warmup(X)
        return f(x)

    assert_same(program(X), 2 * X)
    assert f.stats()["calls"] == 3


def test_a_neighbor_list_stays_on_the_device_of_its_positions(tmp_path):
    code = """
        import jax, numpy as np, torchcall
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from models import error_of

        whole = NamedSharding(Mesh(np.array(jax.devices()), ("i",)), P())
        batch = np.zeros(1, np.int32)
        search = torchcall.mliap.neighbor_list(3.0)
        place = jax.device_put(np.zeros((1, 3), np.float32), jax.devices()[2])
        cell = 2 * np.eye(3, dtype=np.float32)[None]
        nbrs = search.allocate(place, cell, np.ones((1, 3), bool), batch)
        for later in (nbrs, nbrs.update(np.zeros((1, 3), np.float32), cell), nbrs.grow()):
            assert later.edge_index.devices() == {jax.devices()[2]}
            assert int(later.n_edges) == 18  # images closer than 1.5 lattice vectors
        text = error_of(jax.device_put(nbrs, whole).grow)
        assert "torchcall: NeighborList.grow: expected a list on one device" in text, text
        print("done")
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    assert run_python(tmp_path, code, **flags).stdout == "done\n"


@pytest.mark.parametrize(
    "platform, parts",
    [
        pytest.param(
            "cuda",
            ["a program for CUDA (torch", "install a torch with CUDA", "CPU"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
        ("tpu", ["platform tpu", "the CPU or a CUDA device"]),
    ],
    ids=["CUDA without a CUDA build of torch", "a platform that torch does not support"],
)
def test_other_platform_is_a_clear_error_at_trace_time(platform, parts):
    f = scripted(double)
    text = error_of(lambda: jax.jit(f).trace(X).lower(lowering_platforms=(platform,)))
    assert re.match(r"torchcall: double: ", text)
    for part in parts:
        assert part in text


def test_requiring_a_cuda_graph_in_a_program_for_the_cpu_is_an_error_at_trace_time():
    f = TorchModuleWrapper(torch.jit.script(double), cuda_graph="require")
    text = error_of(lambda: jax.jit(f).lower(X))
    assert "cuda_graph='require' in a program for the CPU" in text
    assert 'cuda_graph="auto"' in text


def test_vmap_over_other_operands_does_not_batch_the_call():
    f = scripted(double)
    got = jax.vmap(lambda w: w * f(X))(np.arange(3, dtype=np.float32))
    assert_same(got, np.arange(3, dtype=np.float32)[:, None, None] * 2 * X)


def test_lowered_program_contains_no_pointer():
    f = scripted(double)
    text = jax.jit(f).lower(X).as_text()
    assert "torchcall" in text
    numbers = [int(n) for n in re.findall(r"(?<![\w.])-?\d{9,}", text)]
    with open("/proc/self/maps") as maps:
        ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    assert not [n for n in numbers for low, high in ranges if low <= n < high]
    assert "0x7f" not in text


LOWERS = """
    import jax, numpy as np, torch, torchcall
    from models import Linear, double, like_input
    modules = [torch.jit.script(Linear(seed=i)) for i in range({others})]
    extra = [torchcall.TorchModuleWrapper(m) for m in modules]
    x = np.ones((2, 3), np.float32)
    [f(x) for f in extra]
    f = torchcall.TorchModuleWrapper(torch.jit.script(double), input_spec=torch.float16)
    g = torchcall.TorchModuleWrapper(torch.jit.script(Linear(seed=9)), requires_grad={grad})
    print(jax.jit(lambda x: (f(x), g(x))).lower(x).as_text())
"""


def test_lowered_text_is_the_same_in_every_process(tmp_path):
    code = functools.partial(LOWERS.format, others=0)
    first = run_python(tmp_path, code(grad=False)).stdout  # with a random hash seed
    second = run_python(tmp_path, code(grad=False), fresh=True, PYTHONHASHSEED="2").stdout
    assert "torchcall" in first
    assert first == second
