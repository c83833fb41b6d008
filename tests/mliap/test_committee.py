"""Committees against single calls of their members and NumPy, in float64."""

import dataclasses

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from engines import package
from models import error_of
from reference import CUTOFF, one_thread

from torchcall.mliap import (
    TorchMliap,
    committee,
    committee_statistics,
    edge_vectors,
    energy,
    energy_and_gradients,
)

__all__ = ["one_thread", "package"]


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def module(seed):
    network = reference.example("message_passing").MessagePassing(
        CUTOFF, seed=seed, features=8, layers=1, cell_gradients=True
    )
    return network.double().eval()


def member(seed, engine="TorchScript", **options):
    made = graphs.script(module(seed)) if engine == "TorchScript" else module(seed)
    return TorchMliap.from_module(made, CUTOFF, True, **options)


def batch():
    return graphs.atom_graph([reference.distorted(18), reference.distorted(9)], slots=5)


def statistics(models, graph):
    """The same by NumPy from single calls."""
    outs = [energy_and_gradients(model, graph) for model in models]
    e, g, h = (np.stack([np.asarray(out[i]) for out in outs]) for i in range(3))
    spread = np.sqrt(((g - g.mean(0)) ** 2).sum(-1).mean(0))
    return e.mean(0), e.std(0), g.mean(0), spread, h.mean(0)


def assert_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "engines",
    [
        pytest.param(("TorchScript",) * 3, id="TorchScript"),
        pytest.param(("eager", "eager"), id="eager", marks=pytest.mark.slow),
        pytest.param(("TorchScript", "eager"), id="mixed", marks=pytest.mark.slow),
    ],
)
def test_mean_and_deviation_are_those_of_single_calls(engines):
    models = [member(seed, engine) for seed, engine in enumerate(engines)]
    graph, made = batch(), committee(models)
    expected = statistics(models, graph)
    assert_equal(committee_statistics(made, graph), expected)
    assert_equal(jax.jit(committee_statistics)(made, graph), expected)
    found = energy_and_gradients(made, graph)
    assert_equal(found, (expected[0], expected[2], expected[4]))
    stats = made.wrapper.stats()
    assert stats["calls"] == 3
    if engines[0] == engines[-1]:
        assert (stats["engine"], stats["fallback"]) == (engines[0], None)
    else:
        assert (stats["engine"], stats["fallback"]) == ("eager", "models[1] is eager")


def test_the_mean_is_differentiated_with_the_members_gradients():
    models = [member(seed) for seed in range(2)]
    graph, made = batch(), committee(models)

    @jax.jit
    @jax.grad
    def gradient(positions):
        return energy(made, dataclasses.replace(graph, positions=positions)).sum()

    expected = statistics(models, graph)[2]
    np.testing.assert_allclose(gradient(graph.positions), expected, rtol=1e-9, atol=1e-12)
    assert made.wrapper.stats()["calls"] == 1


class Springs(torch.nn.Module):
    """E = Σ exp(−r² / width²) over edges."""

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = torch.nn.Parameter(torch.tensor(width))

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        per_edge = torch.exp(-edge_vectors(input).square().sum(1) / self.width.square())
        system = input["batch"][input["edge_index"][0]]
        return torch.zeros_like(input["charge"]).index_add(0, system, per_edge)


def test_second_derivatives_are_the_means_of_the_members():
    springs = [Springs(width).double() for width in (2.0, 3.0)]
    models = [TorchMliap.from_energy(spring, CUTOFF) for spring in springs]
    graph = batch()

    def product(model):
        def total(positions):
            return energy(model, dataclasses.replace(graph, positions=positions)).sum()

        moves = jnp.cos(graph.positions)
        return jax.jit(lambda x: jax.jvp(jax.grad(total), (x,), (moves,))[1])

    found = product(committee(models))(graph.positions)
    expected = np.mean([product(model)(graph.positions) for model in models], 0)
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_statistics_are_one_custom_call_also_beside_the_gradient_of_the_mean():
    graph, made = batch(), committee([member(seed) for seed in range(2)])

    def mean(positions):
        graph_ = dataclasses.replace(graph, positions=positions)
        return energy(made, graph_).sum(), committee_statistics(made, jax.lax.stop_gradient(graph_))

    text = jax.jit(committee_statistics).lower(made, graph).as_text()
    assert text.count("stablehlo.custom_call @torchcall") == 1
    (_, out), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(graph.positions)
    np.testing.assert_allclose(gradient, out.position_gradients, rtol=1e-9, atol=1e-12)


def test_mapped_graphs_are_one_call():
    models = [member(seed) for seed in range(2)]
    graph, made = batch(), committee(models)
    moved = graph.positions + 0.01 * jnp.cos(graph.positions)

    def of(positions):
        return committee_statistics(made, dataclasses.replace(graph, positions=positions))

    found = jax.jit(jax.vmap(of))(jnp.stack([graph.positions, moved]))
    for k, positions in enumerate((graph.positions, moved)):
        expected = statistics(models, dataclasses.replace(graph, positions=positions))
        assert_equal(jax.tree.map(lambda a, k=k: a[k], found), expected)
    assert made.wrapper.stats()["calls"] == 1


class Writing(torch.nn.Module):
    """Writes to its input, in float32."""

    species = (6, 14, 8)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos = input["pos"]
        gradients = self.weight.detach() * pos
        pos.mul_(2.0)
        input["pos"] = pos
        per_atom = 0.125 * pos.square().sum(1)
        energy = torch.zeros_like(input["charge"]).index_add(0, input["batch"], per_atom)
        return {"energy": energy, "position_gradients": gradients}


def test_members_do_not_see_each_others_writes_and_may_have_other_dtypes():
    writing = TorchMliap.from_module(graphs.script(Writing()), CUTOFF, requires_grad=False)
    other = TorchMliap.from_module(graphs.script(Writing().double()), CUTOFF)
    graph, made = batch(), committee([writing, other, writing])
    assert made.species == (6, 8, 14)
    out = committee_statistics(made, graph)
    square = 0.5 * (np.asarray(graph.positions) ** 2).sum(1)
    expected = [square[np.asarray(graph.batch) == s].sum() for s in range(2)]
    np.testing.assert_allclose(out.energy, expected, rtol=1e-5)
    np.testing.assert_allclose(out.position_gradients, graph.positions, rtol=1e-5)
    np.testing.assert_allclose(out.energy_deviation, 0, atol=1e-4)
    assert out.cell_gradients is None


def test_each_capacity_is_another_program():
    made, graph = committee([member(0)]), batch()
    committee_statistics(dataclasses.replace(made, capacity=(90, 9000, 5)), graph)
    small = dataclasses.replace(made, capacity=(3, 90, 5))
    assert "n_atoms: expected at least" in error_of(lambda: committee_statistics(small, graph))


def test_no_graphs():
    made, graph = committee([member(0)]), batch()
    none = jnp.zeros((0, *graph.positions.shape))

    def of(positions):
        return committee_statistics(made, dataclasses.replace(graph, positions=positions))

    out = jax.vmap(of)(none)
    assert [x.shape for x in out] == [(0, *x.shape) for x in of(graph.positions)]


def test_an_incomplete_list_gives_nan():
    made = committee([member(0)])
    graph = dataclasses.replace(batch(), did_overflow=jnp.array(True))
    out = committee_statistics(made, graph)
    assert all(np.isnan(x).all() for x in out)


def test_errors_name_the_member(package):
    model, graph = member(0), batch()
    longer = TorchMliap.from_module(graphs.script(module(1)), CUTOFF + 1, True)
    without = TorchMliap.from_module(graphs.script(Writing()), CUTOFF, requires_grad=False)
    fixed = TorchMliap.from_module(graphs.script(module(0)), CUTOFF, True, capacity=(30, 900, 3))
    cases = {
        "expected one or more models": lambda: committee([]),
        "models: expected a list of TorchMliap, got TorchMliap": lambda: committee(model),
        "expected a TorchMliap of a torch module, got function": lambda: committee(
            [dataclasses.replace(model, wrapper=lambda input: input)]
        ),
        f"models[1]: cutoff: expected [{CUTOFF}] Å as in models[0], got [{CUTOFF + 1}]": lambda: (
            committee([model, longer])
        ),
        "models[1]: expected a TorchScript or eager model, got a package": lambda: committee(
            [model, TorchMliap.from_package(package)]
        ),
        "models[1]: capacity: expected a model for any shapes": lambda: committee([model, fixed]),
        "models[1]: compute_cell_gradients: expected True": lambda: committee([model, without]),
        "models[0]: expected a TorchMliap of a torch module, got str": lambda: committee(["a"]),
        "expected a model made by torchcall.mliap.committee": lambda: committee_statistics(
            model, graph
        ),
        "derivatives are not supported; differentiate": lambda: jax.grad(
            lambda x: committee_statistics(
                committee([model]), dataclasses.replace(graph, positions=x)
            ).energy.sum()
        )(graph.positions),
    }
    for message, call in cases.items():
        assert message in error_of(call)
