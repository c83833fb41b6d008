"""What an eager model keeps of its inputs, and does to them, stays its own affair."""

import gc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from torchcall import TorchModuleWrapper

X = np.array([0.5, -1.0, 2.0], np.float32)
SPEC = jax.ShapeDtypeStruct((3,), jnp.float32)


class Keeper(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept.append(self.part(x))
        return x * 2

    def part(self, x: torch.Tensor) -> torch.Tensor:
        return x


class KeepsView(Keeper):
    def part(self, x: torch.Tensor) -> torch.Tensor:
        return x[1:]


class KeepsDetached(Keeper):
    def part(self, x: torch.Tensor) -> torch.Tensor:
        return x.detach()


class KeepsNumpy(Keeper):
    def part(self, x: torch.Tensor) -> Any:
        return x.numpy()


@pytest.mark.parametrize(
    "make", [Keeper, KeepsView, KeepsDetached, KeepsNumpy], ids=lambda make: make.__name__
)
def test_what_a_model_keeps_of_an_input_stays_as_it_was(make):
    module = make()
    f = jax.jit(TorchModuleWrapper(module, output_spec=SPEC))
    calls = [X, X + 10, X + 20]
    module.kept.clear()
    for x in calls:
        np.testing.assert_array_equal(f(jnp.asarray(x)), 2 * x)
    gc.collect()
    for x, kept in zip(calls, module.kept[-3:], strict=True):
        expected = module.part(torch.from_numpy(x))
        np.testing.assert_array_equal(np.asarray(kept), np.asarray(expected))


def test_a_kept_input_is_counted():
    f = TorchModuleWrapper(Keeper())
    f(X)
    f(X + 1)
    assert f.stats()["kept_inputs"] == 2


def test_an_input_in_the_traceback_of_an_error_is_not_kept():
    def fails(x: torch.Tensor) -> torch.Tensor:
        y = x[1:]
        raise ValueError(f"no good: {float(y.sum())}")

    f = TorchModuleWrapper(fails, output_spec=SPEC)
    for _ in range(2):
        with pytest.raises(Exception, match="no good"):
            f(X)
    assert f.stats()["kept_inputs"] == 0


def test_an_attribute_set_on_an_input_is_gone_in_the_next_call():
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
def test_a_model_that_writes_to_an_input_works_on_a_copy(write):
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


def test_a_write_that_nobody_foresaw_is_an_error():
    calls = []

    def model(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 1:  # not while it is followed
            x.mul_(2)
        return x + 0

    with pytest.raises(Exception, match=r"operand args\[0\]: expected to be read only"):
        jax.block_until_ready(TorchModuleWrapper(model)(np.ones(1 << 19, np.float32)))
    small = jnp.asarray(X)
    calls.clear()
    np.testing.assert_array_equal(TorchModuleWrapper(model)(small), 2 * X)
    np.testing.assert_array_equal(small, X)  # small inputs are copied always


def test_a_tensor_that_was_cached_while_the_model_was_followed_is_an_error():
    cache: dict[int, torch.Tensor] = {}

    def model(x: torch.Tensor) -> torch.Tensor:
        return cache.setdefault(len(x), torch.arange(float(len(x))))

    f = TorchModuleWrapper(model)
    with pytest.raises(Exception, match="expected a plain tensor, got one of a Python subclass"):
        f(X)
    cache.clear()
    g = TorchModuleWrapper(model, output_spec=SPEC)  # not followed
    for _ in range(2):
        np.testing.assert_array_equal(g(X), np.arange(3.0))


def test_results_without_memory_are_numbers_or_an_error():
    f = TorchModuleWrapper(lambda x: torch._efficientzerotensor(x.shape), output_spec=SPEC)
    np.testing.assert_array_equal(f(X), np.zeros(3))


def exchanges_storage(x: torch.Tensor) -> torch.Tensor:
    x.set_(x.flip(0))
    return x.flip(0)


def exchanges_dtype(x: torch.Tensor) -> torch.Tensor:
    x.data = x.data.double()
    return x.float()


def exchanges_for_a_view(x: torch.Tensor) -> torch.Tensor:
    y = x * 1
    x.data = torch.zeros(4)[1:]
    return y


def resizes(x: torch.Tensor) -> torch.Tensor:
    x.resize_(10)
    return x[:3] * 1


def transposes(x: torch.Tensor) -> torch.Tensor:
    return x.unsqueeze_(0).t_()[:, 0] * 1


@pytest.mark.parametrize(
    "model", [resizes, transposes, exchanges_storage, exchanges_dtype, exchanges_for_a_view]
)
def test_an_input_may_be_changed_in_place_for_another(model):
    f = TorchModuleWrapper(model, output_spec=SPEC)
    for i in range(3):
        np.testing.assert_array_equal(f(X + i), X + i)
