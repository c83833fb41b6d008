"""Ctrl-C while models run, and processes that end while they do."""

import numpy as np
import pytest
import torch
from models import run_python

import torchcall

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
    package = torchcall.load(os.environ["PACKAGE"])
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
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    def ends_in(kind, run):
        interrupt_soon()
        try:
            jax.block_until_ready(run())
        except BaseException as error:
            assert type(error) is kind, repr(error)
        else:
            raise SystemExit("the program was not interrupted")
        for f in (eager, script, package):  # the process stays usable
            np.testing.assert_array_equal(jax.jit(f)(X), 2 * X)

    jitted = jax.jit(sleeper)
    ends_in(KeyboardInterrupt, lambda: sleeper(X))
    ends_in(KeyboardInterrupt, lambda: jitted(X))
    ends_in(KeyboardInterrupt, lambda: jitted(X))
    for f in (eager, script, package):
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
        while time.perf_counter() < start + 0.6:
            np.testing.assert_array_equal(short(X), X)
    assert seen == [1, 1], seen
    print("done")
"""


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "double.pt2"
    return torchcall.compile(Double(), path, example=(np.ones(3, np.float32),), dynamic=False)


def test_ctrl_c_ends_programs_with_what_the_handler_raises(tmp_path, package):
    done = run_python(tmp_path, PRELUDE + INTERRUPTS, PACKAGE=str(package))
    assert done.stdout == "done\n"


STARTED_IGNORING = """
    import os, signal, sys

    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        os.execv(sys.executable, [sys.executable, __file__])
"""

IGNORES = """
    def naps(x):
        time.sleep(0.3)
        return x * 2

    nap = torchcall.TorchModuleWrapper(naps, output_spec=SPEC)
    programs = [jax.jit(nap), nap, *(make(f, 20_000) for f in (eager, script, package)
                                     for make in (loop, loop_elsewhere))]

    def all_give_their_results():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        done = threading.Event()

        def send():
            while not done.wait(0.05):
                os.kill(os.getpid(), signal.SIGINT)

        sender = threading.Thread(target=send)
        sender.start()
        for k, program in enumerate(programs):
            np.testing.assert_array_equal(program(X), 2 * X if k < 2 else X)
        done.set()
        sender.join()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    all_give_their_results()
    print("done")
"""


@pytest.mark.parametrize("start", ["", STARTED_IGNORING], ids=["later", "from the start"])
def test_a_process_that_ignores_sigint_is_not_interrupted(tmp_path, package, start):
    done = run_python(tmp_path, start + PRELUDE + IGNORES, PACKAGE=str(package))
    assert done.stdout == "done\n"


RUNNING = "loop_elsewhere({})(X); time.sleep(0.3)"
# Not tested: daemon threads that call JAX. Python ends them inside JAX's own code, which aborts.
ENDS = {
    "without waiting": ("", 0),
    "by sys.exit": ("sys.exit(3)", 3),
    "by an exception": ("raise ArithmeticError('uncaught')", 1),
}


@pytest.mark.parametrize(
    "engine, end",
    [("eager", end) for end in ENDS]
    + [("script", "without waiting"), ("package", "without waiting")]
    # All engines share the code that waits.
    + [
        pytest.param(engine, end, marks=pytest.mark.slow)
        for engine in ("script", "package")
        for end in ("by sys.exit", "by an exception")
    ],
)
def test_a_process_that_ends_while_calls_run_ends_as_usual(tmp_path, package, engine, end):
    code, status = ENDS[end]
    program = f"{PRELUDE}    {RUNNING.format(engine)}\n    {code}\n"
    stderr = run_python(tmp_path, program, status=status, PACKAGE=str(package)).stderr
    if end == "by an exception":
        traceback, last = stderr.rstrip().rsplit("\n", 1)
        assert traceback.startswith("Traceback (most recent call last):")
        assert last == "ArithmeticError: uncaught"
    else:
        assert stderr == ""
