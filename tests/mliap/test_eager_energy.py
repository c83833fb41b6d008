"""Energies outside programs: compiled once, and not longer alive than their model."""

import gc
import weakref
from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from graphs import QUICK
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall.mliap import TorchMliap, _energy, energy, energy_and_gradients

# torch warns that TorchScript is deprecated.
pytestmark = [
    pytest.mark.usefixtures("x64"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


class Trap(torch.nn.Module):
    """`k/2 Σ r²` by system. NumPy owns k, so that a weak reference shows when it is freed."""

    def __init__(self, stiffness: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("stiffness", torch.from_numpy(stiffness))

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos = input["pos"]
        per_atom = 0.5 * self.stiffness[0] * (pos * pos).sum(1)
        zero = torch.zeros(input["cell"].size(0), dtype=pos.dtype)
        return {
            "energy": zero.index_add(0, input["batch"], per_atom),
            "position_gradients": self.stiffness[0] * pos,
        }


@pytest.fixture
def graph():
    return graphs.atom_graph([reference.systems()["molecule"]], slots=2)


def trap(stiffness, **options):
    weight = np.full(1000, stiffness)
    module = torch.jit.script(Trap(weight))
    return TorchMliap.from_module(module, CUTOFF, requires_grad=False, **options), weight


def of(model, graph):
    """Energies and gradients, by each of the ways."""

    def total(positions):
        return energy(model, replace(graph, positions=positions)).sum()

    value, slope = jax.value_and_grad(total)(graph.positions)
    out = energy_and_gradients(model, graph)
    return value, slope, out.energy, out.position_gradients, energy(model, graph)


def test_results_outside_programs_are_those_inside(graph):
    model, _ = trap(3.0)
    run = jax.jit(lambda g: of(model, g), compiler_options=QUICK)
    inside = jax.block_until_ready(run(graph))
    before = model.wrapper.stats()["calls"]
    found = jax.block_until_ready(of(model, graph))
    assert model.wrapper.stats()["calls"] == before + 3
    for x, y in zip(found, inside, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-14)
    np.testing.assert_allclose(found[1], 3.0 * graph.positions, rtol=1e-14)


def test_one_program_serves_all_calls_of_the_same_shapes(graph, monkeypatch):
    model, _ = trap(3.0)
    traces = []
    pad = TorchMliap.padded
    monkeypatch.setattr(TorchMliap, "padded", lambda *a: traces.append(1) or pad(*a))
    for k in range(3):
        of(replace(model), replace(graph, positions=graph.positions + k))
    assert len(traces) == 1
    energy(model, replace(graph, charge=jnp.ones(1)))
    assert len(traces) == 2


def test_models_with_other_weights_or_options_share_no_program(graph):
    (soft, _), (stiff, _) = trap(2.0), trap(5.0)
    fixed = replace(soft, capacity=(12, 80, 3), narrow=False)
    np.testing.assert_allclose(energy(stiff, graph), 2.5 * energy(soft, graph), rtol=1e-14)
    np.testing.assert_allclose(energy(fixed, graph), energy(soft, graph), rtol=1e-14)
    longer = replace(soft, cutoff=replace(soft.cutoff, data=2 * soft.cutoff.data))
    np.testing.assert_allclose(energy(longer, graph), energy(soft, graph), rtol=1e-14)
    assert _energy._program(longer) is _energy._program(soft)


def mapped(model, graph):
    both = jnp.stack([graph.positions, graph.positions + 1])
    return jax.vmap(lambda x: energy(model, replace(graph, positions=x)))(both)


def test_a_model_is_freed_after_calls_outside_programs(graph, live_plans):
    before = live_plans()
    model, weight = trap(3.0)
    jax.block_until_ready((of(model, graph), mapped(model, graph)))
    second = jax.hessian(lambda x, m=model: energy(m, replace(graph, positions=x)).sum())
    n = graph.positions.size
    found = second(graph.positions).reshape(n, n)
    np.testing.assert_allclose(found, 3 * np.eye(n), atol=1e-12)
    del second
    alive = weakref.ref(weight)
    del weight
    assert alive() is not None
    del model
    for _ in range(20):
        gc.collect()
        gc.unfreeze()
        if alive() is None:
            break
    assert alive() is None
    assert live_plans() == before
