"""Operators that `simplify` removes from a traced graph, and those that it must not."""

import collections

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from torchcall.mliap._compile._simplify import simplify

WEIGHT = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)


def traced(function, *examples):
    """The graph before and after, and the counts of the operators that remain."""
    module = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*examples)
    simplify(module)
    calls = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
    return module, collections.Counter(calls)


def assert_same(function, module, *inputs):
    for _ in range(2):  # a graph that changes its constants differs the second time
        expected = function(*(x.clone() for x in inputs))
        torch.testing.assert_close(module(*(x.clone() for x in inputs)), expected)


@pytest.fixture
def x():
    return torch.arange(6, dtype=torch.float64).reshape(3, 2)


def test_operators_on_weights_are_evaluated_once(x):
    def function(x):
        return x @ ((WEIGHT * 2.0).exp() + 1.0).t()

    module, count = traced(function, x)
    assert count == {"aten.t.default": 1, "aten.mm.default": 1}
    assert_same(function, module, torch.cat([x, -x]))
    assert len(list(module.buffers())) == 1


def test_a_larger_result_is_not_stored(x):
    def function(x):
        return x + WEIGHT[0].expand(50, 2).exp().sum(0)

    module, count = traced(function, x)
    assert count["aten.exp.default"] == 1
    assert_same(function, module, x)


def test_repeated_operators_are_executed_once(x):
    def function(x):
        return x.t().sin() + x.t().sin() * x.size(0) + x.t().sin().view(2, -1)

    module, count = traced(function, x)
    assert count["aten.sin.default"] == count["aten.t.default"] == 1
    assert count["aten.view.default"] == 0
    assert_same(function, module, torch.cat([x, x]))


def test_equal_numbers_of_two_types_are_different_arguments(x):
    def function(x):
        return (x.sum(0) * 0.0).reciprocal(), (x.sum(0) * -0.0).reciprocal(), x.long() * 1, x * 1.0

    module, _ = traced(function, x)
    assert_same(function, module, x)


def test_tensors_that_are_written_stay_separate(x):
    def function(x):
        first, second = x.new_zeros(2), x.new_zeros(2)
        first.add_(x[0])
        copy = WEIGHT.clone()
        copy.view(-1)[1:].mul_(x[1, 0])
        before = x.sin()
        before.unsqueeze(0).add_(1.0)
        return first, second, copy, before, x.sin()

    module, count = traced(function, x)
    assert count["aten.new_zeros.default"] == count["aten.sin.default"] == 2
    assert_same(function, module, x + 1)


def test_random_numbers_stay_separate(x):
    _, count = traced(lambda x: torch.rand_like(x) - torch.rand_like(x), x)
    assert count["aten.rand_like.default"] == 2
