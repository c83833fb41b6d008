"""Packages add any number of elements, whatever the example had."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._inductor.codegen import cpp
from torch._inductor.virtualized import V

import torchcall
from torchcall._compile._sums import sums_of_any_size


def test_the_choice_of_a_sum_restricts_no_size(monkeypatch):
    # As in torch 2.11, with 4096 numbers.
    def choice(_, kind, dtype, scalar):
        V.graph.sizevars.check_leq(kind, 4096)
        return dtype, scalar

    class Sizes:
        checks: list[tuple[object, ...]] = []  # noqa: RUF012

        def check_leq(self, *sides):
            self.checks.append(sides)

    monkeypatch.setattr(cpp.CppKernel, "need_use_acc_helper", choice)
    kernel = cpp.CppKernel.__new__(cpp.CppKernel)
    with V.set_graph_handler(SimpleNamespace(sizevars=Sizes())):  # type: ignore[arg-type]
        with sums_of_any_size():
            assert kernel.need_use_acc_helper("sum", torch.float, False) == (torch.float, False)
        assert not Sizes.checks
        assert cpp.CppKernel.need_use_acc_helper is choice
        kernel.need_use_acc_helper("sum", torch.float, False)
    assert Sizes.checks == [("sum", 4096)]


class Total(torch.nn.Module):
    def forward(self, x):
        return (x * x).sum()


@pytest.mark.slow
@pytest.mark.parametrize("size", [100, 20_000])
def test_sums_are_right_for_fewer_and_more_numbers_than_the_examples(tmp_path, size):
    x = np.random.default_rng(0).normal(size=30_000).astype(np.float32)
    path = torchcall.compile(Total(), tmp_path / "total.pt2", example=(torch.ones(size),))
    total = torchcall.load(path)
    for n in (2, 1000, 4096, 4097, 30_000):
        np.testing.assert_allclose(total(x[:n]), (x[:n].astype(float) ** 2).sum(), rtol=1e-5)
