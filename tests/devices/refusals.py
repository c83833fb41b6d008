"""Calls that cannot be replays, in a process with stand-ins: see test_on_stand_ins.py."""

import gc
import warnings

import jax
import numpy as np
import pytest
import torch
from devices.potentials import eager_forces, script
from torch import Tensor, nn

from torchcall import TorchModuleWrapper
from torchcall._cuda import capture as _capture

X = np.arange(12, dtype=np.float32).reshape(3, 4)
SAME = jax.ShapeDtypeStruct(X.shape, X.dtype)
ENGINES = pytest.mark.parametrize("make", [script, eager_forces], ids=["TorchScript", "eager"])


class Synchronising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1.0 + float(x.sum().item()))


def counted_on_the_host(x: Tensor) -> Tensor:
    return x + x[x > 0].sum()


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.calls.add_(1)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shapes.append(x.shape)
        return x * 2


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def own_graphs(x: Tensor) -> Tensor:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        y = x * 2
        graph.capture_end()
    graph.replay()
    return y


_kept: list[Tensor] = []


def keeping(x: Tensor) -> Tensor:
    _kept[:] = [x]
    return x * 2


def same(model, **options):
    return TorchModuleWrapper(model, output_spec=SAME, **options)


MODELS = {
    "a TorchScript model that waits for a number": (
        lambda **o: same(torch.jit.script(Synchronising()), **o),
        "operation not permitted when stream is capturing",
    ),
    "an eager model that waits for a number": (
        lambda **o: same(Synchronising(), **o),
        "operation not permitted when stream is capturing",
    ),
    "one whose shapes depend on values": (
        lambda **o: same(counted_on_the_host, **o),
        "operation not permitted when stream is capturing",
    ),
    "one that assigns attributes": (
        lambda **o: same(torch.jit.script(Stateful()), **o),
        "changes its own attributes",
    ),
    "Python that assigns attributes": (lambda **o: same(Stateful(), **o), "its own 'calls'"),
    "Python that writes to a buffer": (lambda **o: same(Counting(), **o), "its own 'calls'"),
    "TorchScript that writes to a buffer": (
        lambda **o: same(torch.jit.script(Counting()), **o),
        "changes its own attributes",
    ),
    "Python that fills a list": (lambda **o: same(Remembering(), **o), "its own 'shapes'"),
    "TorchScript that draws random numbers": (
        lambda **o: same(torch.jit.script(Drawing()), **o),
        "draws random numbers",
    ),
    "Python that draws random numbers": (lambda **o: same(Drawing(), **o), "draws random numbers"),
    "one that has CUDA graphs of its own": (lambda **o: same(own_graphs, **o), "of its own"),
    "one that keeps its input": (lambda **o: same(keeping, **o), "keeps an input"),
}
NOT_CAPTURABLE = pytest.mark.parametrize("make, reason", MODELS.values(), ids=list(MODELS))


@NOT_CAPTURABLE
def test_what_cannot_be_captured_runs_plainly_and_says_so_once(machine, make, reason):
    f = make()
    calls = machine.prepared(f, X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            calls(X)
    stats = f.stats()
    assert reason in stats["fallback"]
    assert (stats["graph_captures"], stats["graph_replays"], stats["calls"]) == (0, 0, 4)
    said = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(said) == 1
    assert reason in said[0]
    _kept.clear()


@NOT_CAPTURABLE
def test_where_a_graph_is_required_that_is_an_error(machine, make, reason):
    calls = machine.prepared(make(cuda_graph="require"), X)
    texts = []
    for _ in range(3):
        try:
            calls(X)
        except RuntimeError as error:
            texts.append(str(error))
    assert len(texts) >= 2
    for text in texts:
        assert text.startswith("cuda_graph='require': the call can't be captured: ")
        assert reason in text
    _kept.clear()


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: module], ids=["script", "eager"])
@pytest.mark.filterwarnings("ignore:torchcall.*without a CUDA graph")
def test_what_a_model_counts_is_counted_once_a_call(machine, make):
    for model in (Stateful(), Counting()):
        calls = machine.prepared(same(make(model)), X)
        for n in range(1, 6):
            np.testing.assert_array_equal(calls(X), n * X)


def test_a_call_that_raises_is_no_reason_against_the_next(machine):
    def picky(x: Tensor) -> Tensor:
        if fails:
            raise ValueError("not this one")
        return x * 2

    fails = False
    f = same(picky)
    calls = machine.prepared(f, X)
    calls(X)
    fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not this one"):
            calls(X)
    fails = False
    for _ in range(3):
        np.testing.assert_array_equal(calls(X), 2 * X)
    stats = f.stats()
    assert (stats["graph_captures"], stats["graph_replays"], stats["fallback"]) == (1, 2, None)


def test_a_void_capture_leaves_torch_mended(machine):
    f = same(torch.jit.script(Synchronising()))
    calls = machine.prepared(f, X)
    calls(X)
    with pytest.warns(RuntimeWarning, match="runs without a CUDA graph"):
        calls(X)
    calls(X)
    assert not machine.device.is_capturing()
    assert len(_capture._void) == 1  # torch's allocator goes on asking it
    assert not machine.generators[0].capturing
    assert machine.generators[0].states_set == 0  # graphs that registered it follow its seed
    assert gc.isenabled()


def test_a_model_that_raises_while_it_is_captured_is_called_plainly(machine):
    def moody(x: Tensor) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise ValueError("not now")
        return x * 2

    f = same(moody)
    calls = machine.prepared(f, X)
    calls(X)
    with pytest.warns(RuntimeWarning, match="not now"):
        np.testing.assert_array_equal(calls(X), 2 * X)
    np.testing.assert_array_equal(calls(X), 2 * X)
    assert "ValueError: not now" in f.stats()["fallback"]
