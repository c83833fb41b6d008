"""Threads, the GIL, torch's thread budget and the floating-point state."""

import ctypes
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import Counter, Linear, assert_same, double, error_of, numpy_of, run_python, torch_of
from torch import Tensor

import torchcall
from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

THREADS = 8


def in_threads(work):
    """Runs `work(i)` in eight Python threads that start together."""
    start = threading.Barrier(THREADS)

    def run(i):
        start.wait()
        return work(i)

    with ThreadPoolExecutor(THREADS) as pool:
        return [done.result() for done in [pool.submit(run, i) for i in range(THREADS)]]


def test_eight_threads_call_one_compiled_program():
    module = Linear()
    f = TorchModuleWrapper(torch.jit.script(module))
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 50, lambda _, x: f(x)[:, :3] * 0.1, x))
    inputs = [np.full((5, 3), i, np.float32) for i in range(THREADS)]
    expected = [np.asarray(program(x)) for x in inputs]

    def work(i):
        return [np.asarray(program(inputs[i])) for _ in range(10)]

    for i, results in enumerate(in_threads(work)):
        for got in results:
            np.testing.assert_array_equal(got, expected[i])
    assert f.stats()["calls"] == 50 * (THREADS + 10 * THREADS)


def test_eight_threads_make_the_first_call_at_once():
    for _ in range(5):
        module = Linear()
        f = TorchModuleWrapper(torch.jit.script(module))
        x = np.ones((2, 3), np.float32)
        for got in in_threads(lambda _, f=f, x=x: f(x)):
            assert_same(got, module(torch_of(x)))


def test_eight_threads_call_one_wrapper_with_their_own_shapes():
    module = Linear()
    f = TorchModuleWrapper(torch.jit.script(module))

    def work(i):
        for repeat in range(10):
            x = np.full((1 + (i + repeat) % 5, 3), i, np.float32)
            np.testing.assert_allclose(f(x), numpy_of(module(torch_of(x))), rtol=1e-6, atol=1e-6)

    in_threads(work)


def test_eight_threads_create_and_drop_wrappers(live_plans):
    before = live_plans()

    def work(i):
        for repeat in range(8):
            f = TorchModuleWrapper(torch.jit.script(double))
            x = np.full(1 + repeat, i, np.float32)
            assert_same(jax.jit(lambda x, f=f: f(x) + 1)(x), 2 * x + 1)

    in_threads(work)
    assert live_plans() == before


class RaisesForOdd(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if int(x.sum().item()) % 2 == 1:
            raise ValueError("odd")
        return x * 2


def test_an_error_in_one_thread_does_not_affect_the_others():
    f = TorchModuleWrapper(torch.jit.script(RaisesForOdd()), output_spec=lambda x: x)
    f(np.float32(0))

    def work(i):
        for _ in range(20):
            if i % 2:
                assert "odd" in error_of(lambda: f(np.float32(i)))
            else:
                assert_same(f(np.float32(i)), np.float32(2 * i))

    in_threads(work)


def test_calls_restore_torchs_settings_of_the_thread():
    before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    f = TorchModuleWrapper(torch.jit.script(Linear()), requires_grad=True)
    jax.block_until_ready(f(np.ones((1, 3), np.float32)))
    g = TorchModuleWrapper(torch.jit.script(Linear()))
    jax.block_until_ready(g(np.ones((1, 3), np.float32)))
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert torch._C._get_graph_executor_optimize()


@pytest.mark.parametrize("kind", ["stateful", "differentiating"])
def test_jitted_loop_finishes_while_another_thread_holds_the_gil(kind):
    progress = np.zeros((), np.float32)
    counter = Counter(torch.from_numpy(progress))  # readable without a call
    options = {"requires_grad": True} if kind == "differentiating" else {}
    f = TorchModuleWrapper(torch.jit.script(counter), **options)
    calls = 100_000
    program = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: f(x) * 0.5, x))
    jax.block_until_ready(program(jnp.ones(3), 2))
    progress[...] = 0

    worker = threading.Thread(target=lambda: jax.block_until_ready(program(jnp.ones(3), calls)))
    hold = ctypes.PyDLL(None).usleep  # a PyDLL function keeps the GIL
    interval = sys.getswitchinterval()
    worker.start()
    try:
        while progress < 1:
            time.sleep(0)
        sys.setswitchinterval(1e4)  # no other thread gets the GIL from here on
        at_start = float(progress)
        deadline = time.monotonic() + 60
        while progress < calls and time.monotonic() < deadline:
            hold(1000)
        at_end = float(progress)
    finally:
        sys.setswitchinterval(interval)
    worker.join()
    assert at_start < calls, "the loop was over before the GIL was held"
    assert at_end == calls


def test_set_num_threads_applies_in_xlas_threads(tmp_path):
    """Runs in a separate process, because the budget is process-wide."""
    code = """
        import sys, threading
        import jax, numpy as np, torch, torchcall
        from torch import Tensor

        class Threads(torch.nn.Module):
            @torch.jit.ignore
            def threads(self) -> int:
                return torch.get_num_threads()

            def forward(self, x: Tensor) -> Tensor:
                return x * 0 + self.threads()

        module = torch.jit.script(Threads())
        f = torchcall.TorchModuleWrapper(module, output_spec=lambda x: x)
        program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, c: f(c), f(x)))
        x = np.ones(10, np.float32)
        for wanted in (3, 1, 2):
            torchcall.set_num_threads(wanted)
            seen = []
            work = lambda: seen.append((int(program(x)[0]), int(f(x)[0])))
            workers = [threading.Thread(target=work) for _ in range(4)]
            [w.start() for w in workers]; [w.join() for w in workers]; work()
            assert torch.get_num_threads() == wanted
            assert seen == [(wanted, wanted)] * 5, (wanted, seen)
        print("done")
    """
    assert run_python(tmp_path, code).stdout == "done\n"


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "2", None], ids=repr)
def test_set_num_threads_refuses_anything_but_a_positive_int(threads):
    before = torch.get_num_threads()
    text = error_of(lambda: torchcall.set_num_threads(threads))
    assert "set_num_threads: expected an int from 1 to" in text
    assert repr(threads) in text
    assert torch.get_num_threads() == before


DENORMAL = np.array([1e-40, -3e-42, 2e-38], np.float32)


def halves(x: Tensor) -> Tensor:
    return x * 0.5


def halves_twice(x: Tensor) -> Tensor:
    return torch.stack([x * 0.5, x * 0.25])


def bits(x):
    return np.asarray(x).view(np.uint32)


def test_denormals_give_the_same_bits_as_in_torch_alone():
    f = TorchModuleWrapper(torch.jit.script(halves))
    expected = halves(torch_of(DENORMAL)).numpy()
    assert np.all(expected != 0)

    @jax.jit
    def program(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jax.lax.select(y != y, y, f(x)), f(x))

    np.testing.assert_array_equal(bits(f(DENORMAL)), bits(expected))
    np.testing.assert_array_equal(bits(jax.jit(f)(DENORMAL)), bits(expected))
    np.testing.assert_array_equal(bits(program(DENORMAL)), bits(expected))


def test_xlas_floating_point_state_is_restored():
    f = TorchModuleWrapper(torch.jit.script(halves))
    half = np.float32(0.5)
    plain = jax.jit(lambda x, half: jax.lax.fori_loop(0, 3, lambda *_: x * half, x))
    mixed = jax.jit(
        lambda x, half: jax.lax.fori_loop(0, 3, lambda *_: (x * half, f(x)), (x, f(x)))[0]
    )
    np.testing.assert_array_equal(bits(mixed(DENORMAL, half)), bits(plain(DENORMAL, half)))


def test_python_thread_does_not_flush_denormals_after_a_call():
    f = TorchModuleWrapper(torch.jit.script(halves))
    jax.block_until_ready(jax.jit(f)(DENORMAL))
    assert np.all(DENORMAL * np.float32(0.5) != 0)
    assert bool((torch_of(DENORMAL) * 0.5 != 0).all())


def test_openmp_workers_started_inside_a_call_do_not_flush_denormals(tmp_path):
    """The first parallel loop of the process runs inside a call and starts the workers."""
    code = """
        import jax, numpy as np, torch, torchcall
        from torch import Tensor

        def halves(x: Tensor) -> Tensor:
            return x * 0.5

        torchcall.set_num_threads(2)
        f = torchcall.TorchModuleWrapper(torch.jit.script(halves))
        x = np.full(4_000_000, 1e-40, np.float32)
        program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda i, y: f(x), x))
        for call in (f, jax.jit(f), program):
            assert np.all(np.asarray(call(x)) != 0), "flushed inside a call"
        assert bool((torch.from_numpy(x) * 0.5 != 0).all()), "flushed on the Python thread"
        print("done")
    """
    assert run_python(tmp_path, code).stdout == "done\n"


def test_denormal_flushing_enabled_by_the_user_stays_enabled(tmp_path):
    code = """
        import jax, numpy as np, torch, torchcall
        from torch import Tensor

        def doubles(x: Tensor) -> Tensor:
            return x * 2

        f = torchcall.TorchModuleWrapper(torch.jit.script(doubles))
        assert torch.set_flush_denormal(True)
        jax.block_until_ready(jax.jit(f)(np.ones(3, np.float32)))
        assert bool((torch.full((3,), 1e-39) * 0.5 == 0).all())
        print("done")
    """
    assert run_python(tmp_path, code).stdout == "done\n"
