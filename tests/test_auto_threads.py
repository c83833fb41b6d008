"""`threads=`: the number of torch's threads in a call, and its choice by measurement."""

import re
import threading

import jax
import numpy as np
import pytest
import torch
from models import assert_same, double, error_of, run_python
from torch import Tensor

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.array([1.0, 2.0, 3.0], np.float32)


@pytest.fixture
def four_threads(monkeypatch):
    """Measurements try up to four threads."""
    monkeypatch.setattr("torchcall._call.threads.thread_budget", lambda: 4)


class Clock:
    """The time of measurements, which only models change."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def model(self, milliseconds):
        """A model that takes as long as its number of threads says, and returns that number."""

        def run(x: Tensor) -> Tensor:
            threads = torch.get_num_threads()
            self.now += 1e-3 * milliseconds.get(threads, 1)
            return x * 0 + threads

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("torchcall._call.threads.time", clock)
    return clock


def thread_counts(x: Tensor) -> Tensor:
    """Of OpenMP and of MKL (0: not in this torch) on the thread that runs the model."""
    mkl = re.search(r"mkl_get_max_threads\(\) : (\d+)", torch.__config__.parallel_info())
    counts = [torch.get_num_threads(), int(mkl.group(1)) if mkl else 0]
    return x.new_tensor(counts)


COUNTS = jax.ShapeDtypeStruct((2,), np.float32)


def choices(f):
    return [entry["threads"] for entry in f.stats()["measured_threads"]]


@pytest.mark.parametrize("threads", [1, 3, np.int32(2)], ids=repr)
def test_a_number_holds_inside_the_calls_only(threads):
    f = TorchModuleWrapper(thread_counts, threads=threads, output_spec=COUNTS)
    before = thread_counts(torch.zeros(1)).tolist()
    expected = [threads, threads if before[1] else 0]
    program = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: f(y), f(x)))
    assert_same(f(np.zeros(2, np.float32)), np.array(expected, np.float32))
    assert_same(program(np.zeros(2, np.float32)), np.array(expected, np.float32))
    assert thread_counts(torch.zeros(1)).tolist() == before
    unlimited = TorchModuleWrapper(thread_counts, output_spec=COUNTS)
    assert_same(unlimited(np.zeros(2, np.float32)), np.array(before, np.float32))
    assert f.stats()["threads"] == threads
    assert f"threads={int(threads)}" in repr(f)


class Threads(torch.nn.Module):
    @torch.jit.ignore
    def threads(self) -> int:
        return torch.get_num_threads()

    def forward(self, x: Tensor) -> Tensor:
        return x * 0 + self.threads()


def test_concurrent_calls_have_their_own_numbers():
    module = torch.jit.script(Threads())
    fs = [TorchModuleWrapper(module, threads=n, output_spec=lambda x: x) for n in (1, 2, 3, 5)]
    programs = [jax.jit(lambda x, f=f: jax.lax.fori_loop(0, 100, lambda _, y: f(y), x)) for f in fs]
    results = {}

    def work(i):
        results[i] = [float(programs[i](X)[0]) for _ in range(3)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(fs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert results == {0: [1] * 3, 1: [2] * 3, 2: [3] * 3, 3: [5] * 3}


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(
    "milliseconds, expected",
    [
        pytest.param({1: 9, 2: 3, 4: 6}, 2, id="two are fastest"),
        pytest.param({1: 0.2, 2: 0.8, 4: 8}, 1, id="one is fastest"),
        pytest.param({1: 9, 2: 6, 4: 2}, 4, id="all are fastest"),
        pytest.param({1: 100, 2: 98, 4: 96}, 1, id="more are not much faster"),
        pytest.param({1: 100, 2: 60, 4: 58}, 2, id="two are almost the fastest"),
    ],
)
def test_auto_chooses_the_fastest_number(clock, milliseconds, expected):
    f = TorchModuleWrapper(clock.model(milliseconds), threads="auto", output_spec=lambda x: x)
    program = jax.jit(f)
    outside = torch.get_num_threads()
    assert_same(program(X), np.full(3, outside, np.float32))
    assert f.stats()["threads"] == "auto"
    assert f.stats()["measured_threads"] == []
    assert "threads='auto'" in repr(f)
    f.warmup(X)
    (entry,) = f.stats()["measured_threads"]
    assert entry["threads"] == expected
    assert entry["operands"] == {"operand args[0]": (3,)}
    assert set(entry["us"]) == {1, 2, 4}
    assert entry["us"] == pytest.approx({n: 1e3 * ms for n, ms in milliseconds.items()})
    assert f.stats()["plans"] == 1
    assert_same(program(X), np.full(3, expected, np.float32))
    assert_same(f(X), np.full(3, expected, np.float32))
    # Calls of other shapes have the process's budget until they are warmed up.
    assert_same(f(X[:2]), np.full(2, outside, np.float32))
    assert choices(f) == [expected]
    f.warmup(X[:2])
    assert choices(f) == [expected, expected]


@pytest.mark.usefixtures("four_threads")
def test_a_slow_call_is_run_twice_with_each_number(clock):
    counted = []
    timed = clock.model({4: 2000, 2: 1000, 1: 7000})

    def model(x: Tensor) -> Tensor:
        counted.append(torch.get_num_threads())
        return timed(x)

    f = TorchModuleWrapper(model, threads="auto", output_spec=lambda x: x)
    f.warmup(X)
    assert counted[2:] == [4, 4, 2, 2, 1, 1]
    assert choices(f) == [2]


@pytest.mark.usefixtures("four_threads")
def test_small_numbers_of_a_slow_call_are_left_out(clock):
    f = TorchModuleWrapper(
        clock.model({4: 1000, 2: 4000, 1: 16000}), threads="auto", output_spec=lambda x: x
    )
    f.warmup(X)
    assert f.stats()["measured_threads"][0]["us"] == {2: 4e6, 4: 1e6}
    assert choices(f) == [4]


@pytest.mark.parametrize("budget, tried", [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6])])
def test_numbers_are_powers_of_two_and_the_budget(budget, tried, monkeypatch):
    monkeypatch.setattr("torchcall._call.threads.thread_budget", lambda: budget)
    f = TorchModuleWrapper(torch.jit.script(double), threads="auto")
    f.warmup(X)
    assert list(f.stats()["measured_threads"][0]["us"]) == tried
    assert_same(f(X), 2 * X)


@pytest.mark.usefixtures("four_threads")
def test_a_failed_measurement_changes_nothing():
    fails = []

    def model(x: Tensor) -> Tensor:
        if fails and torch.get_num_threads() == 2:
            raise ValueError("not with two threads")
        return x * 0 + torch.get_num_threads()

    f = TorchModuleWrapper(model, threads="auto", output_spec=lambda x: x)
    outside = f(X)
    fails.append(True)
    if torch.get_num_threads() != 2:
        assert "not with two threads" in error_of(lambda: f.warmup(X))
        assert choices(f) == []
        assert_same(f(X), outside)


@pytest.mark.usefixtures("four_threads")
def test_calls_and_warm_ups_run_at_the_same_time():
    f = TorchModuleWrapper(torch.jit.script(double), threads="auto")
    stop = threading.Event()
    wrong = []

    def call(i):
        x = np.full(3, i, np.float32)
        while not stop.is_set():
            if not np.array_equal(f(x), 2 * x):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    warmers = [threading.Thread(target=f.warmup, args=(X,)) for _ in range(2)]
    for thread in callers + warmers:
        thread.start()
    for thread in warmers:
        thread.join()
    stop.set()
    for thread in callers:
        thread.join()
    assert wrong == []
    assert len(choices(f)) == 1


def test_warmup_of_traced_arrays_is_an_error():
    f = TorchModuleWrapper(torch.jit.script(double), threads="auto")
    text = error_of(lambda: jax.jit(f.warmup)(X))
    assert "warmup: expected real data, got traced arrays; call it outside jax.jit" in text


@pytest.mark.parametrize("threads", [0, -1, 5000, 1.5, True, "2", "all", [1]], ids=repr)
def test_wrong_values_are_refused(threads):
    text = error_of(lambda: TorchModuleWrapper(double, threads=threads))
    assert "torchcall: threads: expected None, 'auto' or an int from 1 to 4096" in text
    assert f"got {threads!r}" in text


def test_a_torch_without_openmp_has_no_number_per_call(monkeypatch):
    info = "ATen parallel backend: native thread pool"
    monkeypatch.setattr(torch.__config__, "parallel_info", lambda: info)
    text = error_of(lambda: TorchModuleWrapper(double, threads="auto"))
    assert "threads: expected None, because this torch does not use OpenMP" in text
    assert_same(TorchModuleWrapper(double)(X), 2 * X)


def test_the_budget_is_that_of_the_process(tmp_path):
    code = """
        import jax, numpy as np, torch, torchcall
        double, same = lambda x: x * 2, lambda x: x
        f = torchcall.TorchModuleWrapper(double, threads="auto", output_spec=same)
        x = np.ones(3, np.float32)
        for budget, tried in ((3, [1, 2, 3]), (1, [1])):
            torchcall.set_num_threads(budget)
            f.warmup(x)
            assert list(f.stats()["measured_threads"][0]["us"]) == tried
            assert torch.get_num_threads() == budget
        print("done")
    """
    assert run_python(tmp_path, code).stdout == "done\n"
