"""Eager models get copies of their inputs: retaining or changing one has no effect elsewhere."""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import aligned, error_of

from torchcall import TorchModuleWrapper

X = np.array([0.5, -1.0, 2.0], np.float32)
SPEC = jax.ShapeDtypeStruct((3,), jnp.float32)
SMALL, LARGE = 3, 1 << 19  # 2 MiB


class Retainer(torch.nn.Module):
    """Doubles `x` and retains `part(x)`."""

    def __init__(self, part: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.part = part
        self.retained: list[Any] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.retained.append(self.part(x))
        return x * 2


def buffer(x: torch.Tensor) -> np.ndarray:
    return np.frombuffer(memoryview(x.numpy()), np.float32)


PARTS = {
    "itself": lambda x: x,
    "a view": lambda x: x[1:],
    "a detached alias": lambda x: x.detach(),
    "an alias of its storage": lambda x: torch.tensor([]).set_(x.untyped_storage(), 0, x.shape),
    "a NumPy array": lambda x: x.numpy(),
    "a DLPack import": lambda x: np.from_dlpack(x),
    "a DLPack import of torch": lambda x: torch.from_dlpack(x),
    "a memoryview": lambda x: memoryview(x.numpy()),
    "a buffer": buffer,
    "an iterator": lambda x: iter(x[:9]),
}


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_what_a_model_retains_of_an_input_does_not_change(part, size):
    module = Retainer(part)
    f = jax.jit(TorchModuleWrapper(module, output_spec=lambda x: x))
    calls = [np.arange(size, dtype=np.float32) + i for i in range(3)]
    for x in calls:
        mine = aligned(x)  # XLA reads the caller's memory, which is overwritten after the call
        np.testing.assert_array_equal(f(mine), 2 * x)
        mine[:] = -99
    gc.collect()
    for x, retained in zip(calls, module.retained, strict=True):
        expected = part(torch.from_numpy(x))
        if hasattr(retained, "__next__"):
            assert [float(y) for y in retained] == [float(y) for y in expected]
        else:
            np.testing.assert_array_equal(np.asarray(retained), np.asarray(expected))


@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
def test_a_thread_started_by_the_model_reads_the_data_of_its_call(size):
    proceed = threading.Event()
    sums: list[float] = []

    def work(x: torch.Tensor) -> None:
        proceed.wait(30)
        sums.append(float(x.double().sum()))

    threads: list[threading.Thread] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        threads.append(threading.Thread(target=work, args=(x,)))
        threads[-1].start()
        return x * 2

    f = jax.jit(TorchModuleWrapper(model, output_spec=lambda x: x))
    for i in range(3):
        mine = aligned(np.full(size, i, np.float32))
        jax.block_until_ready(f(mine))
        mine[:] = -99
    proceed.set()
    for thread in threads:
        thread.join(30)
    assert sorted(sums) == [0.0, 1.0 * size, 2.0 * size]


def test_resized_and_cast_inputs_have_their_values_and_are_counted():
    f = TorchModuleWrapper(
        lambda x, i: x.resize_(5)[i], input_spec=((None, torch.int64), {}), output_spec=SPEC
    )
    np.testing.assert_array_equal(f(X, np.array([2, 0, 1], np.int32)), X[[2, 0, 1]])
    stats = f.stats()
    assert stats["copied_inputs"] == 2
    assert stats["bytes_copied"] == 3 * 4 + 3 * 8 + 3 * 4


@pytest.mark.parametrize("share_inputs", [False, True], ids=["copied", "shared"])
def test_an_error_of_the_model_retains_no_input(share_inputs):
    references: list[weakref.ref[torch.Tensor]] = []

    def fails(x: torch.Tensor) -> torch.Tensor:
        references.append(weakref.ref(x))
        y = x[1:]
        raise ValueError(f"no good: {float(y.sum())}")

    f = TorchModuleWrapper(fails, output_spec=SPEC, share_inputs=share_inputs)
    for _ in range(2):
        with pytest.raises(Exception, match="no good"):
            f(X)
    gc.collect()
    assert [ref() for ref in references] == [None, None]


def test_an_attribute_set_on_an_input_does_not_reach_the_next_call():
    def count(x: torch.Tensor) -> torch.Tensor:
        x.count = getattr(x, "count", 0) + 1  # pyright: ignore[reportAttributeAccessIssue]
        return x * x.count  # pyright: ignore[reportAttributeAccessIssue]

    f = TorchModuleWrapper(count)
    for i in range(3):
        np.testing.assert_array_equal(f(X + i), X + i)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: x[1:].zero_(),
        lambda x: x.data.add_(1),
        lambda x: torch.add(x, 1, out=x),
        lambda x: x.numpy().fill(7),
    ],
    ids=["in place", "through a view", "through .data", "as out=", "through NumPy"],
)
def test_a_model_that_writes_to_an_input_writes_to_a_copy(write):
    def model(x: torch.Tensor) -> torch.Tensor:
        write(x)
        return x * 1

    x = jnp.asarray(X)
    expected = torch.from_numpy(X.copy())
    write(expected)
    f = TorchModuleWrapper(model, output_spec=SPEC)
    np.testing.assert_array_equal(jax.jit(f)(x), expected)
    np.testing.assert_array_equal(x, X)
    assert f.stats()["copied_inputs"] == 1


# Shared inputs


def test_shared_inputs_refer_to_the_memory_of_xla():
    addresses: list[int] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        addresses.append(x.data_ptr())
        return x * 2

    x = aligned(np.arange(LARGE, dtype=np.float32))
    f = TorchModuleWrapper(model, share_inputs=True, output_spec=lambda x: x)
    np.testing.assert_array_equal(f(x), 2 * x)
    assert addresses == [x.ctypes.data]
    assert f.stats()["copied_inputs"] == 0
    assert "share_inputs=True" in repr(f)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (2, 3), (2, 1, 4)], ids=str)
def test_shared_and_cast_inputs_have_their_values_shapes_and_dtypes(shape):
    def model(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        assert i.dtype is torch.int64
        return x + i

    x = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    i = np.full(shape, 3, np.int32)
    for share_inputs in (False, True):
        spec = ((None, torch.int64), {})
        f = TorchModuleWrapper(model, share_inputs=share_inputs, input_spec=spec)
        np.testing.assert_array_equal(f(x, i), x + 3)


@pytest.mark.parametrize(
    "part", [PARTS["itself"], PARTS["a view"], PARTS["a detached alias"], PARTS["a NumPy array"]]
)
def test_retaining_a_shared_input_is_an_error(part):
    module = Retainer(part)
    f = TorchModuleWrapper(module, share_inputs=True, output_spec=SPEC)
    for _ in range(2):
        text = error_of(lambda: f(aligned(X)))
        assert (
            "operand args[0]: share_inputs=True: expected an input that the model does not" in text
        )
        assert "retain after the call" in text
    assert isinstance(module.retained[0], np.ndarray) or torch.equal(
        module.retained[0], part(torch.from_numpy(X))
    )
    module.part = lambda _: None
    np.testing.assert_array_equal(f(X), 2 * X)


def test_a_result_that_is_the_shared_input_or_saves_it_for_gradients_does_not_retain_it():
    f = TorchModuleWrapper(lambda x: (x, x[1:]), share_inputs=True)
    np.testing.assert_array_equal(f(X)[1], X[1:])

    def forces(x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_(True)
        return -torch.autograd.grad((x**3).sum(), x)[0]

    g = TorchModuleWrapper(forces, share_inputs=True, requires_grad=True)
    np.testing.assert_allclose(g(X), -3 * X**2, rtol=1e-6)


def test_writing_to_a_shared_input_is_an_error():
    f = TorchModuleWrapper(lambda x: x.mul_(2) + 0, share_inputs=True, output_spec=SPEC)
    assert "the model does not write to" in error_of(lambda: f(aligned(X)))


def test_share_inputs_is_an_error_for_other_engines():
    scripted = torch.jit.script(torch.nn.ReLU())
    with pytest.raises(ValueError, match="share_inputs=True: expected an eager module or function"):
        TorchModuleWrapper(scripted, share_inputs=True)
    with pytest.raises(TypeError, match="share_inputs: expected True or False, got 1"):
        TorchModuleWrapper(torch.nn.ReLU(), share_inputs=1)  # pyright: ignore[reportArgumentType]


def test_returning_a_tensor_cached_during_tracing_is_an_error():
    cache: dict[int, torch.Tensor] = {}

    def model(x: torch.Tensor) -> torch.Tensor:
        return cache.setdefault(len(x), torch.arange(float(len(x))))

    f = TorchModuleWrapper(model)
    with pytest.raises(Exception, match="expected a plain tensor, got one of a Python subclass"):
        f(X)
    cache.clear()
    g = TorchModuleWrapper(model, output_spec=SPEC)  # not traced
    for _ in range(2):
        np.testing.assert_array_equal(g(X), np.arange(3.0))


def test_results_without_memory_have_their_values():
    f = TorchModuleWrapper(lambda x: torch._efficientzerotensor(x.shape), output_spec=SPEC)
    np.testing.assert_array_equal(f(X), np.zeros(3))


def replaces_storage(x: torch.Tensor) -> torch.Tensor:
    x.set_(x.flip(0))
    return x.flip(0)


def changes_dtype(x: torch.Tensor) -> torch.Tensor:
    x.data = x.data.double()
    return x.float()


def replaces_by_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    x.data = torch.zeros(4)[1:]
    return y


def resizes(x: torch.Tensor) -> torch.Tensor:
    x.resize_(10)
    return x[:3] * 1


def transposes(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze_(0).t_()[:, 0] * 1


@pytest.mark.parametrize(
    "model", [resizes, transposes, replaces_storage, changes_dtype, replaces_by_a_view]
)
def test_a_model_may_replace_or_reshape_an_input_in_place(model):
    f = TorchModuleWrapper(model, output_spec=SPEC)
    for i in range(3):
        np.testing.assert_array_equal(f(X + i), X + i)
