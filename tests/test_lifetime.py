"""Plans and models live as long as a wrapper or an executable needs them, and no longer."""

import gc
import os
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import Linear, Scale, assert_same, double, numpy_of, shift, torch_of
from torch import Tensor, nn

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)
MIB = 2**20


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def freed(reference: weakref.ref) -> bool:
    """Whether an object is freed by a garbage collection.

    XLA's threads may still hold the arrays of the last call, and a cycle may contain an object that
    an earlier test module has frozen. What then remains is frozen again: each collection of all
    objects takes a second.
    """
    for attempt in range(20):
        gc.collect()
        if reference() is None:
            if attempt:
                gc.freeze()
            return True
        gc.unfreeze()
        time.sleep(0.1)
    return False


class BorrowsWeight(nn.Module):
    """`x * weight[0]`; NumPy owns the weight, so that a weak reference shows when it is freed."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(array))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[0]


def borrowing_wrapper(factor: float = 3.0):
    array = np.full(1000, factor, np.float32)
    return TorchModuleWrapper(torch.jit.script(BorrowsWeight(array))), weakref.ref(array)


def test_wrapper_made_inside_a_jitted_function_works_after_it_is_collected():
    module = torch.jit.script(double)
    made = []

    @jax.jit
    def program(x):
        f = TorchModuleWrapper(module)
        made.append(weakref.ref(f))
        return f(x) + 1

    assert_same(program(X), 2 * X + 1)
    gc.collect()
    assert freed(made[0])
    for _ in range(3):
        assert_same(program(X), 2 * X + 1)
    assert_same(program(X[:1]), 2 * X[:1] + 1)
    assert len(made) == 2


def test_wrapper_made_inside_a_loop_body_works_after_it_is_collected():
    module = torch.jit.script(shift)

    @jax.jit
    def program(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: TorchModuleWrapper(module)(x), x)

    assert_same(program(X), X + 5)
    gc.collect()
    assert_same(program(X), X + 5)


def test_wrapper_recreated_a_hundred_times_gives_no_stale_result_and_leaks_nothing(live_plans):
    """Twenty programs, each of which creates six wrappers and calls them with new shapes."""
    module = torch.jit.script(Linear())
    before = live_plans()
    memory = []
    for i in range(20):
        xs = [np.full((1 + (i * 6 + j) % 37, 3), i + j, np.float32) for j in range(6)]
        program = jax.jit(lambda xs: [TorchModuleWrapper(module)(x) for x in xs])
        for x, got in zip(xs, program(xs), strict=True):
            np.testing.assert_array_equal(got, numpy_of(module(torch_of(x))))
        assert live_plans() <= before + 10
        del program
        assert live_plans() == before
        jax.clear_caches()
        memory.append(resident_bytes())
    # The first programs fill caches and pools.
    assert memory[-1] - memory[9] < 24 * MIB, [m // MIB for m in memory]


def test_wrapper_recreated_eagerly_gives_no_stale_result(live_plans):
    module = torch.jit.script(Linear())
    before = live_plans()
    for i in range(60):
        x = np.full((1 + i % 7, 3), i, np.float32)
        f = TorchModuleWrapper(module)
        assert_same(f(x), module(torch_of(x)))
        del f
    assert live_plans() == before


def test_wrappers_with_different_code_at_one_address_give_no_stale_result():
    modules = [torch.jit.script(double), torch.jit.script(shift)]
    expected = [2 * X, X + 1]
    for i in range(60):
        f = TorchModuleWrapper(modules[i % 2])
        assert_same(f(X), expected[i % 2])
        del f


def test_a_hundred_thousand_calls_do_not_leak_memory():
    f = TorchModuleWrapper(torch.jit.script(Linear()))

    @jax.jit
    def program(x, calls):
        return jax.lax.fori_loop(0, calls, lambda _, x: f(x)[:, :3] * 0.1, x)

    x = jnp.asarray(X)
    jax.block_until_ready((program(x, 10_000), [f(x) for _ in range(2_000)]))
    before = resident_bytes()
    calls = f.stats()["calls"]
    jax.block_until_ready(program(x, 90_000))
    for _ in range(10_000):
        y = f(x)
    jax.block_until_ready(y)
    assert f.stats()["calls"] - calls == 100_000
    assert resident_bytes() - before < 8 * MIB


def test_failing_calls_do_not_leak_memory():
    f = TorchModuleWrapper(torch.jit.script(Raises()), output_spec=jax.ShapeDtypeStruct((), "f4"))
    x = jnp.zeros(250_000)

    def fail(times):
        for _ in range(times):
            with pytest.raises((RuntimeError, ValueError), match="torchcall"):
                jax.block_until_ready(f(x))

    fail(100)
    before = resident_bytes()
    fail(500)
    assert resident_bytes() - before < 32 * MIB


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x + 1
        if y.size(0) > 0:
            raise ValueError("never")
        return y.sum()


@pytest.mark.parametrize("order", ["wrapper first", "program first"])
@pytest.mark.parametrize("ahead_of_time", [False, True], ids=["jitted", "compiled ahead of time"])
def test_model_is_freed_when_wrapper_and_programs_are_gone(order, ahead_of_time, live_plans):
    before = live_plans()
    f, weight = borrowing_wrapper()
    program = jax.jit(lambda x, f=f: f(x) + 1)
    if ahead_of_time:
        program = program.lower(X).compile()
    assert_same(program(X), 3 * X + 1)
    if order == "wrapper first":
        if ahead_of_time:
            del f
            gc.collect()
            assert_same(program(X), 3 * X + 1)
        else:
            del f  # the jitted function still refers to it
        assert weight() is not None
        del program
    else:
        del program
        gc.collect()
        assert_same(f(X), 3 * X)
        assert weight() is not None
        del f
    gc.collect()
    assert live_plans() == before
    assert freed(weight)


def test_model_is_freed_when_an_eagerly_called_wrapper_is_gone(live_plans):
    before = live_plans()
    f, weight = borrowing_wrapper()
    for rows in (1, 2):
        jax.block_until_ready(f(X[:rows]))
    assert live_plans() == before + 2
    del f
    gc.collect()
    assert live_plans() == before
    assert freed(weight)


def test_model_is_freed_when_a_directly_jitted_wrapper_is_gone(live_plans):
    before = live_plans()
    f, weight = borrowing_wrapper()
    program = jax.jit(f)
    assert_same(program(X), 3 * X)
    del f, program
    gc.collect()
    assert live_plans() == before
    assert freed(weight)


def test_model_is_freed_after_a_failed_call():
    f, weight = borrowing_wrapper()
    with pytest.raises((TypeError, ValueError)):
        f("no array")
    with pytest.raises((TypeError, ValueError)):
        f(X, X)
    del f
    gc.collect()
    assert freed(weight)


def test_lowered_program_keeps_its_plan_alive_until_it_is_compiled():
    f, weight = borrowing_wrapper()
    lowered = jax.jit(lambda x, f=f: f(x)).lower(X)
    del f
    gc.collect()
    compiled = lowered.compile()
    del lowered
    gc.collect()
    assert_same(compiled(X), 3 * X)
    del compiled
    gc.collect()
    assert freed(weight)


def test_jaxpr_keeps_its_plan_alive():
    f, weight = borrowing_wrapper()
    jaxpr = jax.make_jaxpr(lambda x, f=f: f(x))(X)
    del f
    gc.collect()
    assert_same(jax.core.eval_jaxpr(jaxpr.jaxpr, jaxpr.consts, X)[0], 3 * X)
    del jaxpr
    jax.clear_caches()
    gc.collect()
    assert freed(weight)


def test_computation_finishes_after_its_executable_is_dropped():
    for _ in range(5):
        f, weight = borrowing_wrapper(1.0)

        def program(x, f=f):
            return jax.lax.fori_loop(0, 3000, lambda _, x: f(x) + 1, x)

        compiled = jax.jit(program).lower(X).compile()
        result = compiled(X)
        del compiled, program, f
        gc.collect()
        assert_same(result, X + 3000)
        del result
        gc.collect()
        assert freed(weight)


def test_eager_call_finishes_after_its_wrapper_is_dropped():
    x = np.ones((300, 300), np.float32)
    for _ in range(5):
        f = TorchModuleWrapper(torch.jit.script(multiplies_matrices))
        result = f(x)
        del f
        gc.collect()
        np.testing.assert_allclose(result, np.linalg.matrix_power(x, 5), rtol=1e-5)


def multiplies_matrices(x: Tensor) -> Tensor:
    return x @ x @ x @ x @ x


def test_wrappers_that_differ_only_in_weights_share_no_state():
    wrappers = [TorchModuleWrapper(torch.jit.script(Scale(s))) for s in (2.0, 3.0, 5.0)]
    assert len(set(wrappers)) == 3
    assert wrappers[0] != wrappers[1]
    program = jax.jit(lambda x: [f(x) for f in wrappers])
    assert_same(program(X), [2 * X, 3 * X, 5 * X])
    assert [f.stats()["calls"] for f in wrappers] == [1, 1, 1]
    static = jax.jit(lambda f, x: f(x), static_argnums=0)
    for f, factor in zip(wrappers, (2, 3, 5), strict=True):
        assert_same(static(f, X), factor * X)


def test_two_wrappers_of_one_module_count_their_calls_separately():
    module = torch.jit.script(double)
    f, g = TorchModuleWrapper(module), TorchModuleWrapper(module)
    f(X)
    f(X)
    assert (f.stats()["calls"], g.stats()["calls"]) == (2, 0)


def test_wrapper_works_after_jaxs_caches_are_cleared():
    f = TorchModuleWrapper(torch.jit.script(double))
    program = jax.jit(f)
    assert_same(program(X), 2 * X)
    jax.clear_caches()
    assert_same(program(X), 2 * X)
    assert_same(f(X), 2 * X)


def test_wrapper_called_with_more_shapes_than_it_caches_stays_correct():
    f = TorchModuleWrapper(torch.jit.script(double))
    programs = [(jax.jit(f), np.ones(n, np.float32)) for n in (1, 2, 3)]
    for program, x in programs:
        assert_same(program(x), 2 * x)
    for n in range(1, 280):
        jax.eval_shape(f, jax.ShapeDtypeStruct((n,), np.float32))
    assert f.stats()["plans"] <= 280
    for program, x in programs:
        assert_same(program(x), 2 * x)
        assert_same(f(x), 2 * x)


def test_pooled_buffers_do_not_grow_with_the_number_of_calls():
    f = TorchModuleWrapper(torch.jit.script(double), input_spec=torch.float64, output_spec=wide)
    x = np.ones(250_000, np.float32)
    with jax.enable_x64(True):
        jax.block_until_ready([f(x) for _ in range(5)])
        before = resident_bytes()
        for _ in range(200):
            jax.block_until_ready(f(x))
    assert resident_bytes() - before < 32 * MIB


def wide(x):
    return jax.ShapeDtypeStruct(x.shape, np.float64)
