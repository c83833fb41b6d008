"""`functional` of modules that refer to parameters from other places than their attributes."""

import functools

import jax
import numpy as np
import pytest
import torch
from models import error_of
from torch import Tensor, nn
from twins import ENGINES, random

import torchcall

X = np.asarray(random(4, 3), np.float32)


def assert_differentiated(parameters, apply, twin):
    """Value and gradient at other parameters than the module's, by the twin, a fresh module."""
    moved = jax.tree.map(lambda p: 0.7 * p + 0.1, parameters)
    with torch.no_grad():
        for key, weight in twin.named_parameters():
            weight.copy_(torch.tensor(np.asarray(moved[key])))
    expected = twin(torch.tensor(X)).square().sum()
    expected.backward()
    for _ in range(2):  # nothing may remain of the first call
        value, gradient = jax.value_and_grad(lambda p: (apply(p, X) ** 2).sum())(moved)
        np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
        for key, weight in twin.named_parameters():
            np.testing.assert_allclose(gradient[key], weight.grad, rtol=1e-4, atol=1e-4)


class Held(nn.Module):
    """Two maps, whose weights are also in a list, a dict and a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)
        self.listed: list[Tensor] = [self.a.weight, self.b.weight]
        self.named: dict[str, Tensor] = {"a": self.a.weight}
        object.__setattr__(self, "alias", self.b.bias)
        self.fixed = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        penalty = self.listed[0].square().sum() + self.listed[1].square().sum()
        return self.b(self.a(x)) * self.alias + self.named["a"] * penalty + self.fixed


class Recurrent(nn.Module):
    """Its weights are in a list, which TorchScript reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x.unsqueeze(0))[0]


class ThreeRows(nn.Module):
    """Calls a part with such references."""

    def __init__(self) -> None:
        super().__init__()
        self.held = Held()

    def forward(self, x: Tensor) -> Tensor:
        return self.held(x[:3])


@pytest.mark.parametrize("kind", [ThreeRows, Recurrent])
@pytest.mark.parametrize("engine", [*ENGINES, "archive"])
def test_lists_and_attributes_that_refer_to_parameters_follow_them(engine, kind, tmp_path):
    module = kind()
    if engine == "archive":
        torch.jit.script(module).save(tmp_path / "module.pt")
        module = tmp_path / "module.pt"
    elif engine == "TorchScript":
        module = torch.jit.script(module)
    assert_differentiated(*torchcall.functional(module), kind())


class Caching(nn.Module):
    """Keeps results of its first call in containers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.cache: dict[str, list[Tensor]] = {"doubled": []}

    def forward(self, x: Tensor) -> Tensor:
        if not self.cache["doubled"]:
            self.cache["doubled"].append(2 * self.weight)
        return x * self.cache["doubled"][0]


def test_containers_have_their_old_entries_in_the_next_call():
    parameters, apply = torchcall.functional(Caching())
    assert_differentiated(parameters, apply, Caching())
    assert_differentiated(parameters, apply, Caching())


class Partial(nn.Module):
    """A function of its parameter, in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.scale = functools.partial(torch.mul, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(x)


def test_a_partial_follows_its_parameter():
    assert_differentiated(*torchcall.functional(Partial()), Partial())


def with_closure(module):
    part = module[0]
    module.function = lambda x: part(x)


def with_object(module):
    module.settings = type("Settings", (), {})()
    module.settings.weight = module[0].weight


def with_hook(module):
    weight = module[0].weight
    module[1].register_forward_hook(lambda _, __, out: out * weight.sum())


@pytest.mark.parametrize(
    "change, attribute, parameter",
    [
        (with_closure, "function", "0.weight"),
        (with_object, "settings", "0.weight"),
        (with_hook, "1._forward_hooks", "0.weight"),
    ],
)
def test_what_would_use_old_parameters_is_refused(change, attribute, parameter):
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    torchcall.functional(module)
    change(module)
    error = error_of(lambda: torchcall.functional(module))
    assert f"functional: {attribute}: expected a module that reads its parameters" in error
    assert f"refers to {parameter!r}" in error


def test_methods_and_functions_without_parameters_are_allowed():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    module.method = module[0].forward
    module.forward = lambda x, of=torch.tanh: of(x)
    torchcall.functional(module)
