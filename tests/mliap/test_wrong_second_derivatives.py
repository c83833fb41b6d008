"""Modules of which torch computes a part of the second derivatives only."""

from dataclasses import replace

import graphs
import jax
import numpy as np
import pytest
import reference
import torch
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall.mliap import TorchMliap, edge_vectors, energy
from torchcall.mliap._hessian_check import wrong_products

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


class Kinks(torch.nn.Module):
    """Each pair's energy is a line between the values of r² at multiples of 2 mÅ, and for
    `wide`, a network of ReLUs of its atoms' densities is added."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        linear = torch.nn.Linear
        self.net = torch.nn.Sequential(linear(1, wide), torch.nn.ReLU(), linear(wide, 1))

    def forward(self, graph: dict[str, torch.Tensor]) -> torch.Tensor:
        r = edge_vectors(graph).square().sum(1).sqrt()
        k = (r * 500).floor()
        pairs = (k * (k + 1) + (2 * k + 1) * (r * 500 - k)) / 250000
        atoms = torch.zeros_like(graph["pos"][:, 0])
        density = atoms.index_add(0, graph["edge_index"][0], torch.exp(-r))
        per_atom = atoms.index_add(0, graph["edge_index"][0], pairs)
        per_atom = per_atom + self.net(density.unsqueeze(1)).squeeze(1)
        return torch.zeros_like(graph["charge"]).index_add(0, graph["batch"], per_atom)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_with_kinks_have_products(dtype):
    """As ReLUs have in JAX: finite differences, whose steps cross kinks, are others."""
    model = TorchMliap.from_energy(Kinks(512), CUTOFF, engine="eager", dtype=dtype)
    before = torch.random.get_rng_state()
    for cells in (False, True):
        assert wrong_products(model.wrapper, CUTOFF, cells) == ""
    assert torch.equal(before, torch.random.get_rng_state())
