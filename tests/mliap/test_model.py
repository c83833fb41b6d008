"""`TorchMliap`: the modules it wraps, its checks, and its use as a pytree."""

import weakref
from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall import TorchModuleWrapper
from torchcall.mliap import (
    SystemId,
    Table,
    TorchMliap,
    energy,
    energy_and_gradients,
    pad_graph,
)


class Returns(torch.nn.Module):
    """Returns outputs of a chosen kind that follow from no potential."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos, cell = input["pos"], input["cell"]
        out = {"energy": cell.sum(2).sum(1), "position_gradients": 2.0 * pos}
        if self.kind == "flat gradients":
            out["position_gradients"] = pos.reshape(-1)
        if self.kind == "one energy":
            out["energy"] = pos.sum().reshape(1)
        if self.kind == "forces":
            out["forces"] = out.pop("position_gradients")
        return out


@pytest.fixture
def graph():
    return graphs.atom_graph([reference.systems()["slab"]], dtype=np.float32)


def generic(kind, compute_cell_gradients=False):
    """A potential around a wrapper that infers its outputs."""
    wrapper = TorchModuleWrapper(graphs.script(Returns(kind)))
    cutoff = Table((SystemId(0),), jnp.asarray([CUTOFF]))
    return TorchMliap(cutoff, wrapper, compute_cell_gradients)


def test_call_passes_the_input_unchanged(graph):
    model = TorchMliap.from_module(graphs.script(Returns("")), CUTOFF)
    padded, _ = pad_graph(graph, cutoff=CUTOFF, n_atoms=20, n_edges=1000, n_systems=4)
    out = model.call(padded)
    assert sorted(out) == ["energy", "position_gradients"]
    np.testing.assert_array_equal(out["position_gradients"], 2 * padded["pos"])
    assert out["energy"].shape == (4,)


def test_indices_are_int64_in_torch(graph):
    class Kinds(torch.nn.Module):
        def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            for key in ["atomic_numbers", "edge_index", "batch"]:
                assert input[key].dtype == torch.int64
            assert input["pbc"].dtype == torch.bool
            for key in ["pos", "cell", "cell_offsets", "charge", "spin"]:
                assert input[key].dtype == torch.float32
            return {"energy": input["charge"], "position_gradients": input["pos"]}

    model = TorchMliap.from_module(graphs.script(Kinds()), CUTOFF)
    assert np.asarray(energy(model, graph)).tolist() == [0.0]


@pytest.mark.parametrize(
    "kind, text",
    [
        ("flat gradients", "position_gradients"),
        ("one energy", "energy"),
        ("forces", "position_gradients"),
    ],
)
def test_missing_and_misshapen_outputs_are_named_in_the_error(graph, kind, text):
    with pytest.raises(ValueError, match=rf"torchcall: Returns: .*{text}.*expected"):
        TorchMliap.from_module(graphs.script(Returns(kind)), CUTOFF)
    with pytest.raises(ValueError, match=rf"torchcall: .*{text}.*expected"):
        energy(generic(kind), graph)


def test_missing_cell_gradients_are_named_in_the_error(graph):
    with pytest.raises(ValueError, match=r"torchcall: Returns: .*cell_gradients.*expect"):
        TorchMliap.from_module(graphs.script(Returns("")), CUTOFF, True)
    with pytest.raises(ValueError, match=r"torchcall: .*cell_gradients.*expect"):
        energy(generic("", True), graph)


def test_module_that_does_not_return_a_dict_is_refused(graph):
    class Bare(torch.nn.Module):
        def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
            return input["pos"]

    wrapper = TorchModuleWrapper(graphs.script(Bare()))
    cutoff = Table((SystemId(0),), jnp.asarray([CUTOFF]))
    with pytest.raises(TypeError, match="Bare: output: expected a dict"):
        TorchMliap(cutoff, wrapper)
    model = TorchMliap(cutoff, lambda input: input["pos"])
    with pytest.raises(TypeError, match=r"torchcall: .*: output: expected a dict"):
        energy(model, graph)


@pytest.mark.parametrize("listed", [CUTOFF - 0.5, CUTOFF + 0.5])
def test_neighbour_list_of_another_cutoff_is_refused(graph, listed):
    model = TorchMliap.from_module(graphs.script(Returns("")), CUTOFF)
    energy(model, replace(graph, list_cutoff=CUTOFF))
    for function in (energy, energy_and_gradients):
        with pytest.raises(ValueError, match=r"torchcall: cutoff: expected .* 4.2 Å, got one with"):
            function(model, replace(graph, list_cutoff=listed))


def test_module_sees_the_capacity_and_exceeding_it_is_an_error(graph):
    n, e = len(graph.positions), graph.edge_index.shape[1]
    module = graphs.script(Returns(""))

    def seen(capacity):
        model = TorchMliap.from_module(module, CUTOFF, capacity=capacity)
        energy(model, graph)
        return [spec.shape for plan in model.wrapper._plans for spec in plan.outputs]

    assert seen((n + 3, e + 5, 4)) == [(4,), (n + 3, 3)]
    for k, axis in enumerate(("n_atoms", "n_edges", "n_systems")):
        capacity = [n + 3, e + 5, 4]
        capacity[k] = 1
        with pytest.raises(ValueError, match=f"torchcall: .*{axis}: expected at least"):
            seen(tuple(capacity))


def test_model_is_a_pytree_and_may_be_an_argument(graph):
    model = TorchMliap.from_module(graphs.script(Returns("")), CUTOFF)
    leaves, structure = jax.tree.flatten(model)
    assert [leaf.shape for leaf in leaves] == [(1,)]
    again = jax.tree.unflatten(structure, leaves)
    assert again.wrapper is model.wrapper
    direct = energy(model, graph)
    np.testing.assert_array_equal(jax.jit(energy)(again, graph), direct)


def test_model_and_its_plans_are_freed_with_the_last_reference(graph, live_plans):
    jax.clear_caches()
    before = live_plans()
    model = TorchMliap.from_module(graphs.script(Returns("")), CUTOFF)

    def use(model):
        jax.block_until_ready(energy(model, graph))
        jax.block_until_ready(jax.jit(lambda g: energy(model, g))(graph))
        gradient = jax.grad(lambda x: energy(model, replace(graph, positions=x)).sum())
        jax.block_until_ready(jax.vmap(gradient)(graph.positions[None]))

    use(model)
    assert live_plans() > before
    wrapper = weakref.ref(model.wrapper)
    del model
    assert live_plans() == before
    assert wrapper() is None


def test_invalid_options_are_refused():
    module = graphs.script(Returns(""))
    with pytest.raises(TypeError, match=r"torchcall: TorchMliap.from_module: output_spec"):
        TorchMliap.from_module(module, CUTOFF, output_spec={})
    with pytest.raises(ValueError, match=r"torchcall: TorchMliap.from_module: narrow"):
        TorchMliap.from_module(module, CUTOFF, narrow=True)
    with pytest.raises(ValueError, match="torchcall: TorchMliap: cutoff"):
        TorchMliap.from_module(module, -1.0)


def test_largest_of_several_cutoffs_sets_the_phantom_cell(graph):
    table = Table.arange(jnp.asarray([3.0, CUTOFF]), label=SystemId)
    assert table.keys == (SystemId(0), SystemId(1))
    assert [key for key, _ in table] == [0, 1]
    assert len(table) == table.size == 2
    model = TorchMliap.from_module(graphs.script(Returns("")), table)
    padded, _ = pad_graph(graph, cutoff=model.cutoff)
    np.testing.assert_array_equal(padded["cell"][1], np.eye(3, dtype=np.float32) * 2 * 4.2)


def test_a_frozen_module_has_no_mode_to_warn_of():
    module = reference.potentials()["Lennard-Jones"].eval()
    frozen = TorchMliap.from_module(torch.jit.freeze(graphs.script(module)), CUTOFF, True)
    assert frozen.wrapper.stats()["engine"] == "TorchScript"


def test_a_part_in_training_mode_is_a_warning():
    part = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Dropout(0.5))

    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.part = part

        def forward(self, input: dict[str, torch.Tensor]):
            atoms = self.part(input["pos"])[:, 0] * 0
            energy = torch.zeros_like(input["charge"]).index_add(0, input["batch"], atoms)
            return {"energy": energy, "position_gradients": torch.zeros_like(input["pos"])}

    for prepare in (torch.nn.Module.train, lambda m: torch.jit.script(m.train())):
        with pytest.warns(UserWarning, match=r"^torchcall: Dropped: .*part.1 \(Dropout\) in tr"):
            TorchMliap.from_module(prepare(Dropped()), 4.0)
    part.eval()
    TorchMliap.from_module(Dropped(), 4.0)
