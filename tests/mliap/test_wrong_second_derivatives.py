"""Modules of which torch computes a part of the second derivatives only."""

from dataclasses import replace

import graphs
import jax
import numpy as np
import pytest
import reference
import torch
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall.mliap import TorchMliap, energy

pytestmark = pytest.mark.usefixtures("x64")


@torch.library.custom_op("torchcall_tests::fourth_power", mutates_args=())
def fourth_power(x: torch.Tensor) -> torch.Tensor:
    return x**4


@fourth_power.register_fake
def _(x):
    return torch.empty_like(x)


def setup(ctx, inputs, output):
    del output  # torch passes it by name
    ctx.save_for_backward(*inputs)


def backward(ctx, cotangent):
    (x,) = ctx.saved_tensors
    return 4 * x.detach() ** 3 * cotangent  # as a backward in C++ that torch cannot look into


fourth_power.register_autograd(backward, setup_context=setup)


class Powers(torch.nn.Module):
    """Σ (s x² + x⁴): only the first term has second derivatives."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, graph: dict[str, torch.Tensor]) -> torch.Tensor:
        x = graph["pos"]
        fourth = torch.ops.torchcall_tests.fourth_power(x)
        per_atom = (self.scale * x * x + fourth).sum(1)
        return torch.zeros_like(graph["charge"]).index_add(0, graph["batch"], per_atom)


@pytest.mark.parametrize("engine", ["script", "eager"])
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_an_operator_whose_backward_detaches_is_an_error_at_trace_time(engine, scale):
    model = TorchMliap.from_energy(Powers(scale), CUTOFF, engine=engine)
    graph = graphs.atom_graph([reference.systems()["triclinic"]])
    x = graph.positions

    def of(positions):
        return energy(model, replace(graph, positions=positions)).sum()

    first = jax.jit(jax.grad(of))(x)
    np.testing.assert_allclose(first, 2 * scale * x + 4 * x**3, rtol=1e-12)
    before = model.wrapper.stats()["calls"]
    text = r"second derivatives: expected gradients by 'pos' .* differ by \d+% from finite diff"
    with pytest.raises(NotImplementedError, match=text):
        jax.eval_shape(jax.hessian(of), x)
    assert model.wrapper.stats()["calls"] == before
