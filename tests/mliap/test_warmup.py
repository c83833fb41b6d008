"""`TorchMliap.warmup`: the call that `energy` makes, and its number of torch threads."""

from dataclasses import replace

import engines
import graphs
import jax
import numpy as np
import pytest
import reference
import torch
from engines import package  # noqa: F401
from reference import CUTOFF, one_thread  # noqa: F401

import torchcall
from torchcall.mliap import TorchMliap, energy

pytestmark = [
    pytest.mark.usefixtures("x64"),
    # torch warns that TorchScript is deprecated.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@pytest.fixture
def graph():
    return graphs.atom_graph([reference.systems()["triclinic"]], slots=40)


def forces(model, graph):
    return jax.value_and_grad(lambda r: energy(model, replace(graph, positions=r)).sum())(
        graph.positions
    )


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_warmup_measures_the_call_that_energy_makes(engine, package, graph, monkeypatch):  # noqa: F811
    monkeypatch.setattr("torchcall._call.threads.thread_budget", lambda: 2)
    plain = engines.potential(engine, package)
    model = engines.potential(engine, package, threads="auto")
    program = jax.jit(forces)
    expected = jax.block_until_ready(program(plain, graph))
    model.warmup(graph)
    (entry,) = model.wrapper.stats()["measured_threads"]
    assert entry["threads"] in entry["us"]
    assert set(entry["us"]) == {1, 2}
    got = program(model, graph)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), got, expected
    )
    assert model.wrapper.stats()["plans"] == 1


@pytest.mark.parametrize("options", [{"narrow": False}, {"capacity": (20, 1000, 3)}], ids=str)
def test_warmup_keeps_the_shapes_of_a_model_that_is_not_narrowed(options, graph):
    module = graphs.script(reference.potentials()["Lennard-Jones"])
    model = TorchMliap.from_module(module, CUTOFF, True, threads="auto", **options)
    model.warmup(graph)
    jax.jit(energy)(model, graph)
    assert model.wrapper.stats()["plans"] == 1
    operands = model.wrapper.stats()["measured_threads"][0]["operands"]
    if "capacity" in options:
        assert operands["operand args[0]['edge_index']"] == (2, 1000)


def test_every_way_to_make_a_potential_takes_threads(package):  # noqa: F811
    module = engines.Energy()
    module.cutoff = CUTOFF
    made = [
        TorchMliap.from_energy(module, engine="eager", threads=1),
        TorchMliap.from_package(package, threads=1),
        torchcall.models.load(package, threads=1, verbose=False),
        torchcall.models.load(module, kind="own", threads=1, engine="eager", verbose=False),
    ]
    assert [model.wrapper.stats()["threads"] for model in made] == [1] * 4
    with pytest.raises(ValueError, match=r"threads: expected None, 'auto' or an int .* got 'many'"):
        TorchMliap.from_package(package, threads="many")


def test_warmup_checks_the_graph_as_energy_does(graph):
    model = graphs.potential("Lennard-Jones")
    with pytest.raises(TypeError, match="warmup: expected real data, got traced arrays"):
        jax.jit(model.warmup)(graph)
    with pytest.raises(ValueError, match="cutoff: expected a neighbour list with the model's"):
        model.warmup(replace(graph, list_cutoff=CUTOFF + 1))
    with pytest.raises(ValueError, match="edge_index"):
        model.warmup(replace(graph, edge_index=graph.edge_index[0]))


def test_warmup_calls_a_wrapper_of_another_kind(graph):
    calls = []

    def wrapper(input):
        calls.append(input["pos"].shape)
        return {"energy": input["charge"], "position_gradients": input["pos"]}

    model = TorchMliap(graphs.potential("Lennard-Jones").cutoff, wrapper)
    model.warmup(graph)
    assert calls == [(len(graph.positions) + 1, 3)]
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("wrong, kind", [(None, "NoneType"), ({"pos": 0}, "dict")])
def test_what_is_no_graph_is_an_error(wrong, kind):
    model = graphs.potential("Lennard-Jones")
    for use in (model.warmup, lambda given: energy(model, given)):
        with pytest.raises(TypeError, match=f"torchcall: graph: expected an AtomGraph, got {kind}"):
            use(wrong)
