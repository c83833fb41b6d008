"""Calls that cannot be captured, on simulated devices. Run by test_simulated_devices.py."""

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


def data_dependent(x: Tensor) -> Tensor:
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


_retained: list[Tensor] = []


def retaining(x: Tensor) -> Tensor:
    _retained[:] = [x]
    return x * 2


def same(model, **options):
    return TorchModuleWrapper(model, output_spec=SAME, **options)


MODELS = {
    "TorchScript that reads a value on the host": (
        lambda **o: same(torch.jit.script(Synchronising()), **o),
        "operation not permitted when stream is capturing",
    ),
    "an eager model that reads a value on the host": (
        lambda **o: same(Synchronising(), **o),
        "operation not permitted when stream is capturing",
    ),
    "data-dependent shapes": (
        lambda **o: same(data_dependent, **o),
        "operation not permitted when stream is capturing",
    ),
    "TorchScript that assigns attributes": (
        lambda **o: same(torch.jit.script(Stateful()), **o),
        "changes its own attributes",
    ),
    "an eager model that assigns attributes": (
        lambda **o: same(Stateful(), **o),
        "its own 'calls'",
    ),
    "an eager model that writes to a buffer": (
        lambda **o: same(Counting(), **o),
        "its own 'calls'",
    ),
    "TorchScript that writes to a buffer": (
        lambda **o: same(torch.jit.script(Counting()), **o),
        "changes its own attributes",
    ),
    "an eager model that fills a list": (
        lambda **o: same(Remembering(), **o),
        "its own 'shapes'",
    ),
    "TorchScript that draws random numbers": (
        lambda **o: same(torch.jit.script(Drawing()), **o),
        "draws random numbers",
    ),
    "an eager model that draws random numbers": (
        lambda **o: same(Drawing(), **o),
        "draws random numbers",
    ),
    "a model with its own CUDA graphs": (lambda **o: same(own_graphs, **o), "of its own"),
    "a model that retains its input": (lambda **o: same(retaining, **o), "an input"),
}
NOT_CAPTURABLE = pytest.mark.parametrize("make, reason", MODELS.values(), ids=list(MODELS))


@NOT_CAPTURABLE
def test_a_model_that_cannot_be_captured_runs_without_a_graph_and_warns_once(machine, make, reason):
    f = make()
    calls = machine.prepared(f, X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            calls(X)
    stats = f.stats()
    assert reason in stats["fallback"]
    assert (stats["graph_captures"], stats["graph_replays"], stats["calls"]) == (0, 0, 4)
    warned = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(warned) == 1
    assert reason in warned[0]
    _retained.clear()


@NOT_CAPTURABLE
def test_require_makes_that_an_error(machine, make, reason):
    calls = machine.prepared(make(cuda_graph="require"), X)
    texts = []
    for _ in range(3):
        try:
            calls(X)
        except RuntimeError as error:
            texts.append(str(error))
    assert len(texts) >= 2
    for text in texts:
        assert text.startswith("cuda_graph='require': the call cannot be captured: ")
        assert reason in text
    _retained.clear()


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: module], ids=["script", "eager"])
@pytest.mark.filterwarnings("ignore:torchcall.*without a CUDA graph")
def test_a_models_counter_advances_once_per_call(machine, make):
    for model in (Stateful(), Counting()):
        calls = machine.prepared(same(make(model)), X)
        for n in range(1, 6):
            np.testing.assert_array_equal(calls(X), n * X)


def test_a_call_that_raises_does_not_prevent_a_later_capture(machine):
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


def test_torchs_state_is_repaired_after_an_invalidated_capture(machine):
    f = same(torch.jit.script(Synchronising()))
    calls = machine.prepared(f, X)
    calls(X)
    with pytest.warns(RuntimeWarning, match="runs without a CUDA graph"):
        calls(X)
    calls(X)
    assert not machine.device.is_capturing()
    assert len(_capture._invalidated) == 1  # torch's allocator still queries it
    assert not machine.generators[0].capturing
    assert machine.generators[0].states_set == 0  # the user's graphs still share its state
    assert gc.isenabled()


def test_a_model_that_raises_during_its_capture_runs_without_a_graph(machine):
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
