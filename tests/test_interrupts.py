"""Ctrl-C while models run, and processes that end while they do."""

import pytest
from models import run_python

PRELUDE = """
    import os, signal, sys, threading, time, warnings
    import jax, jax.numpy as jnp, numpy as np, torch, torchcall

    warnings.simplefilter("ignore")
    X = np.ones(3, np.float32)
    SPEC = jax.ShapeDtypeStruct((3,), np.float32)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def slow(x):
        for _ in range(600):
            time.sleep(0.05)
        return x * 2

    eager = torchcall.TorchModuleWrapper(double)
    script = torchcall.TorchModuleWrapper(torch.jit.script(double))
    sleeper = torchcall.TorchModuleWrapper(slow, output_spec=SPEC)

    def loop(f, n=1_000_000_000):
        # Few operations: XLA runs it on the calling thread.
        return jax.jit(lambda x: jax.lax.fori_loop(0, n, lambda _, x: f(x) * 0.5, x))

    def loop_elsewhere(f, n=1_000_000_000):
        ones = jnp.ones((400, 400))
        return jax.jit(lambda x: loop(f, n)(x) + 0 * (ones @ ones).sum())
"""

INTERRUPTS = """
    def interrupt_soon():
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    def ends_in(kind, run):
        interrupt_soon()
        try:
            jax.block_until_ready(run())
        except BaseException as error:
            assert type(error) is kind, repr(error)
        else:
            raise SystemExit("the program was not interrupted")
        for f in (eager, script):  # the process stays usable
            np.testing.assert_array_equal(jax.jit(f)(X), 2 * X)

    jitted = jax.jit(sleeper)
    ends_in(KeyboardInterrupt, lambda: sleeper(X))
    ends_in(KeyboardInterrupt, lambda: jitted(X))
    ends_in(KeyboardInterrupt, lambda: jitted(X))
    for f in (eager, script):
        for make in (loop, loop_elsewhere):
            ends_in(KeyboardInterrupt, lambda: make(f)(X))
            compiled = make(f).lower(X).compile()
            ends_in(KeyboardInterrupt, lambda: compiled(X))

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    signal.signal(signal.SIGINT, stop)
    ends_in(Stop, lambda: loop(script)(X))

    seen = []
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    for make in (loop, loop_elsewhere):
        short = make(script, 200_000)
        jax.block_until_ready(short(X))
        interrupt_soon()
        start = time.perf_counter()
        while time.perf_counter() < start + 1:
            np.testing.assert_array_equal(short(X), X)
    assert seen == [1, 1], seen
    print("done")
"""


def test_ctrl_c_ends_programs_with_what_the_handler_raises(tmp_path):
    assert run_python(tmp_path, PRELUDE + INTERRUPTS).stdout == "done\n"


ENDS = {
    "end": ("loop_elsewhere({f})(X); time.sleep(0.3)", 0),
    "sys.exit": ("loop_elsewhere({f})(X); time.sleep(0.3); sys.exit(3)", 3),
    "exception": ("loop_elsewhere({f})(X); time.sleep(0.3); raise SystemExit(4)", 4),
    "daemon": (
        "g = jax.jit({f}); threading.Thread(daemon=True, target=lambda: "
        "[jax.block_until_ready(g(X)) for _ in iter(int, 1)]).start(); time.sleep(1)",
        0,
    ),
}


@pytest.mark.parametrize("engine", ["eager", "script"])
@pytest.mark.parametrize("end, status", ENDS.values(), ids=ENDS)
def test_a_process_that_ends_while_calls_run_ends_as_usual(tmp_path, engine, end, status):
    done = run_python(tmp_path, PRELUDE + "    " + end.format(f=engine) + "\n", status=status)
    assert done.stderr == ""
