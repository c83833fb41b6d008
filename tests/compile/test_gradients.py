"""Gradients derived from energies, against modules that return gradients, and against JAX."""

import jax
import numpy as np
import pytest
import reference
import torch
from energies import Energies, Pairs, Soft, odd

from torchcall._compile._copy import copy_of, training_note, training_part
from torchcall.mliap._compile._gradients import PotentialModule

CPU = torch.device("cpu")
KINDS = ["triclinic", "left-handed", "slab", "slab with a vacuum vector", "wire", "molecule"]


def potential_of(module, graph, dtype=None):
    result = PotentialModule(module, dtype, CPU)
    result.inspect(graph)
    return result


def energy_only(name):
    module = reference.potentials()[name]
    return Pairs() if name == "Lennard-Jones" else Energies(module)


@pytest.mark.parametrize("name", list(reference.potentials()))
def test_derived_gradients_equal_those_of_modules_that_differentiate(name):
    graph = reference.graph([reference.systems()[kind] for kind in KINDS], n_atoms=2)
    derived = potential_of(energy_only(name), graph)
    assert not derived.differentiates
    expected, found = reference.potentials()[name](graph), derived.evaluate(graph)
    for key, value in found.items():
        size = float(expected[key].abs().max())
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-11 * size)
    assert not found["position_gradients"][-2:].any()


@pytest.mark.parametrize("name", list(reference.potentials()))
def test_single_precision_is_accurate_far_from_the_origin(name):
    members = [reference.systems()[kind] for kind in KINDS]
    errors = []
    for shift in ([0.0, 0.0, 0.0], [1000.0, -800.0, 600.0]):
        far = [m.moved(np.float32(m.positions + shift).astype(float), m.cell) for m in members]
        graph = reference.graph(far, n_atoms=2)
        expected = reference.potentials()[name](graph)["cell_gradients"]
        graph = {k: v.float() if v.is_floating_point() else v for k, v in graph.items()}
        found = potential_of(energy_only(name), graph, torch.float32).evaluate(graph)
        error = (found["cell_gradients"] - expected).abs().max() / expected.abs().max()
        errors.append(float(error))
    assert errors[1] < 5e-6, errors


def test_open_axes_with_dependent_vectors_get_zero():
    slab = reference.systems()["slab"]
    graph = reference.graph([slab], n_atoms=2)
    expected = potential_of(Pairs(), graph).evaluate(graph)["cell_gradients"]
    graph["cell"][0, 2] = graph["cell"][0, 0] + graph["cell"][0, 1]
    found = potential_of(Pairs(), graph).evaluate(graph)["cell_gradients"]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    assert not found[0, 2].any()


@pytest.mark.usefixtures("x64")
def test_derived_gradients_equal_those_of_the_potential_in_jax():
    member = reference.systems()["triclinic"]
    graph = reference.graph([member])
    energy = jax.value_and_grad(reference.lennard_jones(member), (0, 1))
    value, (by_position, by_cell) = energy(member.positions, member.cell)
    found = potential_of(Pairs(), graph).evaluate(graph)
    np.testing.assert_allclose(found["energy"][0], value, rtol=1e-12)
    np.testing.assert_allclose(found["position_gradients"][:-1], by_position, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found["cell_gradients"][0], by_cell, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cell", [True, False], ids=["with cell gradients", "without"])
def test_gradients_of_modules_that_differentiate_are_returned_unchanged(cell, example):
    module = reference.example("stillinger_weber").StillingerWeber(cell_gradients=cell)
    taken = potential_of(module, example)
    assert taken.differentiates
    assert taken.cell_gradients is cell
    expected, found = module(example), taken.evaluate(example)
    assert list(found) == list(expected)
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


def test_an_energy_without_positions_has_zero_gradients(example):
    """Reference energies of the elements, say. A detached energy would be an error."""

    def count(input, _):
        ones = torch.ones_like(input["charge"][input["batch"]])
        return torch.zeros_like(input["charge"]).index_add(0, input["batch"], ones)

    found = potential_of(odd(count), example).evaluate(example)
    assert found["energy"].sum() == len(example["pos"])
    assert not found["position_gradients"].any()
    assert not found["cell_gradients"].any()


def test_results_have_the_positions_dtype(example):
    network = reference.example("message_passing").MessagePassing(reference.CUTOFF).double()
    graph = {k: v.float() if v.is_floating_point() else v for k, v in example.items()}
    found = potential_of(network, graph).evaluate(graph)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_dtype_casts_the_weights_of_the_copy_only(example):
    module = Soft(torch.float32)
    found = potential_of(module, example, torch.float64)
    assert found.module.weight.dtype == torch.float64
    assert module.weight.dtype == torch.float32


def test_the_callers_module_does_not_change(example):
    module = Soft()
    module.part = torch.nn.Dropout(0.5)
    module.register_buffer("count", torch.zeros(()))
    module.notes, module.tied = [], module.weight

    def forward(self, input, plain=Soft.forward):
        self.count += 1
        self.notes.append(1)
        return plain(self, input)

    module.__class__ = type("Counting", (Soft,), {"forward": forward})
    found = potential_of(module, example)
    assert module.training
    assert module.part.training
    assert module.weight.requires_grad
    assert module.weight.grad is None
    assert module.count == 0
    assert module.notes == []
    assert not found.module.training
    assert not found.module.weight.requires_grad
    assert found.module.weight is found.module.tied
    assert found.module.weight.data_ptr() != module.weight.data_ptr()


def test_only_parts_that_training_mode_changes_are_reported():
    network = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Dropout(0.5))
    assert "1 (Dropout) is in training mode" in training_note(network.train())
    assert training_note(torch.nn.Sequential(network.eval())) == ""
    assert training_note(torch.nn.Linear(1, 1)) == ""
    assert training_part(torch.jit.script(network.train())) == "1 (Dropout)"


def test_a_copy_shares_attributes_that_cannot_be_copied():
    import threading

    module = Soft()
    module.lock, module.parts = threading.Lock(), torch.nn.ModuleList()
    module.derived = module.weight * 2
    copied = copy_of(module, "Soft", None, CPU)
    assert copied.lock is module.lock
    assert copied.parts is not module.parts
    assert copied.derived is not module.derived
    assert not copied.derived.requires_grad


def test_a_module_that_writes_to_its_input_gets_copies(example):
    def doubled_in_place(input, _):
        input["cell"].mul_(1.0)
        input["pos"].add_(0.0)
        return Soft()(input)

    def run(flat):
        tensors = [value.clone() for value in example.values()]
        versions = [tensor._version for tensor in tensors]
        flat(*tensors)
        return [tensor._version for tensor in tensors] == versions

    assert run(potential_of(odd(doubled_in_place), example).flat)
    assert run(potential_of(Soft(), example).flat)
