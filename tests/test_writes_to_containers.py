"""A module that modifies a container, or writes to an element of it, gets a private copy."""

import jax
import numpy as np
import pytest
import torch
from models import aligned, assert_same, torch_of
from torch import Tensor

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3) - 2


def sentence(function):
    return function.__name__.replace("_", " ")


def writes_to_dict_element(d: dict[str, Tensor]) -> Tensor:
    d["x"].add_(1)
    return d["x"] + d["y"]


def writes_to_all_dict_values(d: dict[str, Tensor]) -> Tensor:
    for value in d.values():
        value.add_(1)
    return d["x"] + d["y"]


def writes_to_dict_items(d: dict[str, Tensor]) -> Tensor:
    for key, value in d.items():
        if key == "x":
            value.mul_(2)
    return d["x"] + d["y"]


def writes_to_view_of_popped_element(d: dict[str, Tensor]) -> Tensor:
    x = d.pop("x")
    x.view(-1).add_(1)
    return x + d["y"]


def assigns_dict_key(d: dict[str, Tensor]) -> Tensor:
    d["x"] = d["x"] + 1
    d["z"] = d["x"] * 2
    return d["x"] + d["y"] + len(d)


def deletes_dict_key(d: dict[str, Tensor]) -> Tensor:
    total = d["x"] + d["y"]
    del d["y"]
    return total + len(d)


def clears_dict(d: dict[str, Tensor]) -> Tensor:
    total = d["x"] + d["y"]
    d.clear()
    return total + len(d)


@pytest.mark.parametrize(
    "function",
    [
        writes_to_dict_element,
        writes_to_all_dict_values,
        writes_to_dict_items,
        writes_to_view_of_popped_element,
        assigns_dict_key,
        deletes_dict_key,
        clears_dict,
    ],
    ids=sentence,
)
def test_module_that_modifies_a_dict_or_its_elements_gets_a_private_copy(function):
    expected = function({"x": torch_of(X), "y": torch_of(X)})
    arguments = {"x": aligned(X), "y": aligned(X)}
    f = jax.jit(TorchModuleWrapper(torch.jit.script(function)))
    for _ in range(3):
        assert_same(f(arguments), expected)
    assert set(arguments) == {"x", "y"}
    np.testing.assert_array_equal(arguments["x"], X)
    np.testing.assert_array_equal(arguments["y"], X)


def writes_to_list_element(xs: list[Tensor]) -> Tensor:
    xs[0].add_(1)
    return xs[0] + xs[1]


def appends(xs: list[Tensor]) -> Tensor:
    xs.append(xs[0] * 2)
    return torch.stack(xs).sum(0)


def pops(xs: list[Tensor]) -> Tensor:
    return xs.pop() + len(xs)


def reverses(xs: list[Tensor]) -> Tensor:
    xs.reverse()
    return xs[0] * 2 + xs[1]


def extends_by_itself(xs: list[Tensor]) -> Tensor:
    xs += [xs[0]]
    xs[2].add_(1)
    return torch.stack(xs).sum(0)


@pytest.mark.parametrize(
    "function", [writes_to_list_element, appends, pops, reverses, extends_by_itself], ids=sentence
)
def test_module_that_modifies_a_list_or_its_elements_gets_a_private_copy(function):
    expected = function([torch_of(X), torch_of(X + 1)])
    arguments = [aligned(X), aligned(X + 1)]
    f = jax.jit(TorchModuleWrapper(torch.jit.script(function)))
    for _ in range(3):
        assert_same(f(arguments), expected)
    assert len(arguments) == 2
    np.testing.assert_array_equal(arguments[0], X)
    np.testing.assert_array_equal(arguments[1], X + 1)


def writes_to_tuple_element(pair: tuple[Tensor, list[Tensor]]) -> Tensor:
    pair[0].add_(1)
    pair[1][0].mul_(2)
    pair[1].append(pair[0])
    return pair[0] + pair[1][0]


def test_module_that_writes_to_nested_elements_gets_private_copies():
    expected = writes_to_tuple_element((torch_of(X), [torch_of(X)]))
    x, y = aligned(X), aligned(X)
    f = jax.jit(TorchModuleWrapper(torch.jit.script(writes_to_tuple_element)))
    for _ in range(3):
        assert_same(f((x, [y])), expected)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, X)
