"""An element that a model does not declare is an error in every engine, never an energy."""

from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from engines import package  # noqa: F401
from graphs import QUICK
from reference import CUTOFF, one_thread  # noqa: F401

import torchcall
from torchcall.mliap import TorchMliap, energy, energy_and_gradients, pad_graph
from torchcall.mliap._species import species_of

pytestmark = pytest.mark.usefixtures("x64")
ENGINES = ["eager", "script", "archive", "package"]


class Springs(torch.nn.Module):
    """Σ r² over edges, and its gradients; two elements are declared."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("species", torch.tensor([14, 6]))

    def forward(self, graph: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        index, cell, system = graph["edge_index"], graph["cell"], graph["batch"]
        shifts = (graph["cell_offsets"].unsqueeze(2) * cell[system[index[0]]]).sum(1)
        r = graph["pos"][index[1]] - graph["pos"][index[0]] + shifts
        by_edge = torch.zeros_like(graph["charge"]).index_add(0, system[index[0]], (r * r).sum(1))
        forces = torch.zeros_like(graph["pos"]).index_add(0, index[1], 2 * r)
        return {"energy": by_edge, "position_gradients": forces.index_add(0, index[0], -2 * r)}


@pytest.fixture(scope="module", params=ENGINES)
def model(request, tmp_path_factory):
    if request.param == "package":
        return TorchMliap.from_package(request.getfixturevalue("package"))
    module = Springs() if request.param == "eager" else torch.jit.script(Springs())
    if request.param == "archive":
        path = tmp_path_factory.mktemp("archive") / "springs.pt"
        module.save(path)
        module = path
    return TorchMliap.from_module(module, CUTOFF, requires_grad=False)


@pytest.fixture(scope="module")
def graph():
    with jax.enable_x64(True):
        graph = graphs.atom_graph([reference.systems()["slab"]], slots=2)
        assert set(np.asarray(graph.atomic_numbers).tolist()) <= {6, 14}
        return graph


def with_element(graph, number):
    return replace(graph, atomic_numbers=graph.atomic_numbers.at[3].set(number))


def error_of(call):
    with pytest.raises((ValueError, RuntimeError), match="torchcall: ") as caught:
        jax.block_until_ready(call())
    return str(caught.value)


@pytest.fixture(scope="module")
def compiled(model):
    return jax.jit(lambda graph: energy(model, graph), compiler_options=QUICK)


@pytest.mark.parametrize("number", [8, -6, 500])
def test_traced_numbers_are_checked_in_the_call(model, compiled, graph, number):
    assert model.species == (6, 14)
    right = compiled(graph)
    message = error_of(lambda: compiled(with_element(graph, number)))
    assert "operand args[0]['atomic_numbers']: expected one of 6, 14" in message
    assert f"got {number} at entry 3" in message
    np.testing.assert_array_equal(compiled(graph), right)


def test_elements_in_a_row_are_listed_as_ranges(graph):
    module = Springs()
    module.species = torch.tensor([1, 2, 3, 6, 13, 14, 127, 126, 125])
    model = TorchMliap.from_module(torch.jit.script(module), CUTOFF, requires_grad=False)
    wrong = with_element(graph, 8)
    listed = "expected one of 1-3, 6, 13, 14, 125-127, got 8"
    assert listed in error_of(lambda: energy(model, wrong))
    assert listed in error_of(lambda: jax.jit(energy, compiler_options=QUICK)(model, wrong))


def test_concrete_numbers_are_checked_when_the_program_is_traced(model, graph):
    wrong = with_element(graph, 8)
    expected = "graph.atomic_numbers: expected one of 6, 14, got 8 at entry 3"

    def at(positions):
        return energy(model, replace(wrong, positions=positions))

    assert expected in error_of(lambda: jax.eval_shape(at, graph.positions))
    assert expected in error_of(lambda: energy_and_gradients(model, wrong))
    padded, _ = pad_graph(wrong, cutoff=CUTOFF)
    assert "['atomic_numbers']: expected one of 6, 14" in error_of(lambda: model.call(padded))


def test_a_molecule_of_hydrogen_is_not_mistaken_for_an_empty_system(compiled, graph):
    hydrogen = replace(graph, atomic_numbers=jnp.ones_like(graph.atomic_numbers))
    assert "got 1 at entry 0" in error_of(lambda: compiled(hydrogen))


def test_padded_atoms_and_empty_systems_may_hold_any_number(model, compiled, graph):
    padded = replace(with_element(graph, 99), batch=graph.batch.at[3].set(-1))
    assert np.isfinite(energy(model, padded)).all()
    assert np.isfinite(compiled(padded)).all()
    empty = replace(graph, batch=jnp.full_like(graph.batch, -1))
    np.testing.assert_array_equal(energy(model, empty), [0.0])
    np.testing.assert_array_equal(compiled(empty), [0.0])


def test_an_index_out_of_range_is_an_error_in_every_engine(model, graph):
    padded, _ = pad_graph(graph, cutoff=CUTOFF)
    call = jax.jit(model.call, compiler_options=QUICK)
    call(padded)
    for key, entry in (("edge_index", (0, 3)), ("batch", 3)):
        wrong = padded | {key: padded[key].at[entry].set(-1)}
        assert f"['{key}']: expected indices from 0 to" in error_of(lambda wrong=wrong: call(wrong))


class Declaring(torch.nn.Module):
    species = (6, 1, 6)

    def forward(self, x):
        return x


class Around(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@pytest.mark.parametrize(
    "module, expected",
    [
        (Declaring(), (1, 6)),
        (Around(Around(Declaring())), (1, 6)),
        (torch.compile(Declaring()), (1, 6)),
        (torch.jit.script(Declaring()), (1, 6)),
        (torch.jit.script(Springs()), (6, 14)),
        (torch.nn.Linear(1, 1), None),
        (len, None),
    ],
    ids=["class", "wrapped twice", "compiled", "scripted class", "scripted buffer", "none", "len"],
)
def test_species_are_read_from_the_module_or_the_one_it_wraps(module, expected):
    assert species_of(module) == expected


def test_a_wrapper_made_by_the_user_is_checked_too(graph):
    wrapper = torchcall.TorchModuleWrapper(Springs())
    made = TorchMliap.from_module(Springs(), CUTOFF, requires_grad=False)
    model = replace(made, wrapper=wrapper)
    wrong = with_element(graph, 8)
    wide = {key: jnp.asarray(value, jnp.int64) for key, value in (
        ("atomic_numbers", wrong.atomic_numbers), ("batch", wrong.batch),
        ("edge_index", wrong.edge_index))}  # fmt: skip
    call = jax.jit(lambda g: energy(model, g), compiler_options=QUICK)
    assert "got 8 at entry 3" in error_of(lambda: call(replace(wrong, **wide)))


def test_refresh_refuses_a_file_that_declares_other_elements(graph, tmp_path):
    path = tmp_path / "springs.pt"
    torch.jit.script(Springs()).save(path)
    model = TorchMliap.from_module(path, CUTOFF, requires_grad=False)
    program = jax.jit(lambda graph: energy(model, graph), compiler_options=QUICK)
    right = program(graph)
    model.wrapper.refresh()  # the same elements
    module = Springs()
    module.species = torch.tensor([14, 8])
    torch.jit.script(module).save(path)
    text = error_of(model.wrapper.refresh)
    assert "refresh: expected the same species, (6, 14), got (8, 14); make a new wrapper" in text
    np.testing.assert_array_equal(program(graph), right)  # the old model
