"""Models and plans of derivatives and mapped calls are freed, in any order and from any thread."""

import gc
import os
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import run_python
from torch import Tensor, nn
from twins import ENGINES, Number, assert_close, number_in_jax, random, wrapped

from torchcall import TorchModuleWrapper, _bridge
from torchcall._call import plan as plans

pytestmark = pytest.mark.usefixtures("x64")
MIB = 2**20


def resident_bytes() -> int:
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def remaining_plans() -> int:
    jax.clear_caches()
    gc.collect()
    return _bridge.live_plans()


@pytest.mark.parametrize("engine", ENGINES)
def test_plans_for_many_sizes_of_a_mapped_axis_are_forgotten(engine, monkeypatch):
    monkeypatch.setattr(plans, "MOST_PLANS", 4)
    before = remaining_plans()
    f = wrapped(Number(), engine)
    first = jax.jit(jax.vmap(f))
    x = random(2, 3)
    assert_close(first(x, x), jax.vmap(number_in_jax)(x, x))
    for size in range(3, 15):
        jax.eval_shape(jax.vmap(jax.grad(f)), *[jax.ShapeDtypeStruct((size, 3), jnp.float64)] * 2)
    jax.clear_caches()
    gc.collect()
    # The call, its gradient, and four mapped forms of each.
    assert _bridge.live_plans() - before <= 10
    assert_close(first(x, x), jax.vmap(number_in_jax)(x, x))
    del f, first
    assert remaining_plans() == before


class Weighted(nn.Module):
    def __init__(self, array: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("weight", torch.from_numpy(array))

    def forward(self, x: Tensor) -> Tensor:
        return (x.sin() * self.weight[0]).sum()


@pytest.mark.parametrize("first", ["wrapper", "program"])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_of_a_gradient_is_freed_with_the_last_that_needs_it(engine, first):
    before = remaining_plans()
    array = np.full(1000, 3.0)
    weight = weakref.ref(array)
    f = wrapped(Weighted(array), engine)
    del array
    x = random(2, 3)
    expected = jax.vmap(jax.grad(lambda x: (3 * jnp.sin(x)).sum()))(x)
    program = jax.jit(jax.vmap(jax.grad(f))).lower(x).compile()
    if first == "wrapper":
        del f
        gc.collect()
        assert_close(program(x), expected)
        del program
    else:
        del program
        gc.collect()
        assert_close(jax.vmap(jax.grad(f))(x), expected)
        del f
    assert remaining_plans() == before
    gc.unfreeze()
    gc.collect()
    gc.freeze()  # each collection of all objects takes a second
    assert weight() is None


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_threads_trace_run_and_drop_gradients_at_once(engine):
    before = remaining_plans()
    shared = wrapped(Number(), engine)
    failures = []
    scripting = threading.Lock()  # ast.parse of Python 3.11, which torch uses, is not thread-safe

    def made():
        with scripting:
            return wrapped(Number(), engine)

    def work(k, shared=shared):
        try:
            with jax.enable_x64(True):
                for repeat in range(12):
                    f = shared if repeat % 2 else made()
                    x = random(2 + (k + repeat) % 3, 3, seed=k)
                    transform = (jax.vmap(jax.grad(f)), jax.vmap(jax.hessian(f)))[repeat % 2]
                    got = jax.jit(lambda x, t=transform: t(x, x))(x)
                    in_jax = (jax.grad, jax.hessian)[repeat % 2](number_in_jax)
                    assert_close(got, jax.vmap(in_jax)(x, x))
                    del f
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures, failures[0]
    del shared, work, threads
    assert remaining_plans() == before


@pytest.mark.slow
def test_ten_thousand_traces_leave_no_growth():
    """Of one wrapper, of many sizes, and of many wrappers."""
    before = remaining_plans()
    scripted = torch.jit.script(Number())
    f = TorchModuleWrapper(scripted)

    def trace(f, size):
        form = jax.ShapeDtypeStruct((size, 3), jnp.float64)
        jax.make_jaxpr(jax.vmap(jax.grad(f)))(form, form)

    def all_kinds(f, times, first):
        for k in range(times):
            trace(f, 2)
            trace(f, first + k)
            trace(TorchModuleWrapper(scripted), 2)
            if k % 50 == 0:
                jax.clear_caches()

    all_kinds(f, 700, 3)  # caches and pools fill
    memory = resident_bytes()
    all_kinds(f, 2700, 703)
    assert resident_bytes() - memory < 48 * MIB
    del f
    assert remaining_plans() == before


AT_EXIT = """
import threading
import jax, jax.numpy as jnp, torch, torchcall

class Slow(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(20000):
            y = y.sin()
        return y.sum()

model = torch.jit.script(Slow())
f = torchcall.TorchModuleWrapper(model if KIND == "TorchScript" else Slow())
gradient = jax.jit(jax.vmap(jax.grad(f)))
x = jnp.ones((50, 3))
run = gradient.lower(x).compile()
run(x)  # asynchronous; the interpreter ends meanwhile
threading.Thread(target=lambda: run(x), daemon=True).start()
print("ends")
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_interpreter_ends_in_the_middle_of_a_mapped_gradient(tmp_path, engine):
    done = run_python(tmp_path, f"KIND = {engine!r}\n{AT_EXIT}", fresh=True)
    assert done.stdout.strip() == "ends"
