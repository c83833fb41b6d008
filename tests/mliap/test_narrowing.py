"""Narrowing: the module sees the valid rows and a phantom, whatever the capacities."""

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
from torchcall.mliap import TorchMliap, energy, energy_and_gradients, pad_graph


class ReportsSizes(torch.nn.Module):
    """Reports the numbers of atoms and edges as an energy; checks that a phantom is included."""

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos, index = input["pos"], input["edge_index"]
        assert input["atomic_numbers"].size(0) == pos.size(0)
        assert input["batch"].size(0) == pos.size(0)
        assert input["cell_offsets"].size(0) == index.size(1)
        assert int(input["batch"].max()) == 1
        assert int(index.max()) < pos.size(0)
        energy = torch.zeros_like(input["charge"])
        energy[0] = 10000.0 * pos.size(0) + index.size(1)
        return {"energy": energy, "position_gradients": torch.ones_like(pos)}


def seen(value):
    return divmod(int(np.asarray(value)), 10000)


def model_of(module, **options):
    return TorchMliap.from_module(graphs.script(module), CUTOFF, **options)


@pytest.fixture
def graph():
    return graphs.atom_graph([reference.systems()["slab"]], dtype=np.float32, slots=500)


@pytest.mark.parametrize("jit", [False, True])
def test_module_sees_valid_rows_and_one_phantom(graph, jit):
    n, e = len(graph.positions), int(graph.n_edges)
    model = model_of(ReportsSizes())
    function = jax.jit(lambda g: energy(model, g)) if jit else lambda g: energy(model, g)
    assert seen(function(graph)[0]) == (n + 1, e + 1)
    padding = jnp.full(n, -1).at[:3].set(0)
    few = replace(graph, batch=padding, n_edges=jnp.int32(0))
    assert seen(function(few)[0]) == (4, 2)
    none = replace(few, batch=jnp.full(n, -1))
    assert seen(function(none)[0]) == (2, 2)


def test_module_sees_the_capacity_without_narrowing(graph):
    n, e = len(graph.positions), graph.edge_index.shape[1]
    assert seen(energy(model_of(ReportsSizes(), narrow=False), graph)[0]) == (n + 1, e)
    fixed = model_of(ReportsSizes(), capacity=(n + 5, e + 7, 3))
    assert seen(energy(fixed, graph)[0]) == (n + 5, e + 7)


def test_full_list_without_a_phantom_edge_works(graph):
    e = int(graph.n_edges)
    full = replace(
        graph, edge_index=graph.edge_index[:, :e], cell_offsets=graph.cell_offsets[:e], n_edges=None
    )
    assert seen(energy(model_of(ReportsSizes()), full)[0]) == (len(graph.positions) + 1, e)


def test_edge_count_may_change_inside_a_loop(graph):
    model = model_of(ReportsSizes())
    counts = jnp.asarray([0, 7, int(graph.n_edges), 1, 300], jnp.int32)

    @jax.jit
    def program(graph):
        return jax.lax.map(lambda count: energy(model, replace(graph, n_edges=count))[0], counts)

    expected = [max(2, int(count) + 1) for count in counts]
    assert [seen(value)[1] for value in program(graph)] == expected


def test_rows_that_the_module_did_not_see_are_zero(graph):
    model = model_of(ReportsSizes())
    padded, masks = pad_graph(graph, cutoff=CUTOFF, n_atoms=40)
    gradients = model.evaluate(padded, masks.n_atoms, masks.n_edges)["position_gradients"]
    rows = len(graph.positions) + 1
    np.testing.assert_array_equal(gradients[:rows], 1)
    np.testing.assert_array_equal(gradients[rows:], 0)


@pytest.mark.parametrize("name", sorted(reference.potentials()))
@pytest.mark.usefixtures("x64")
def test_narrowed_results_equal_those_of_the_padded_graph(name):
    members = [reference.systems()[key] for key in ("slab", "wire")]
    graph = graphs.atom_graph(members, slots=1000)
    narrowed = energy_and_gradients(graphs.potential(name), graph)
    whole = energy_and_gradients(graphs.potential(name, narrow=False), graph)
    exact = energy_and_gradients(graphs.potential(name), graphs.atom_graph(members))
    for got, padded, expected in zip(narrowed, whole, exact, strict=True):
        np.testing.assert_array_equal(got, expected)
        np.testing.assert_allclose(got, padded, rtol=1e-12, atol=1e-12)


class WrongOutputs(ReportsSizes):
    """Its outputs depend on values, so that nothing is known about them before the first call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos = input["pos"]
        out = {"energy": input["charge"], "position_gradients": pos}
        if not bool(pos.isfinite().all()):
            return out
        if self.kind == "rows":
            out["position_gradients"] = pos.new_zeros((1000, 3))
        if self.kind == "double":
            out["energy"] = out["energy"].double() + 0.1
        if self.kind == "extra":
            out["features"] = pos.new_zeros((7,))
        if self.kind == "int":
            out["energy"] = out["energy"].long()
        return out


def test_output_rows_are_checked_against_the_narrowed_size(graph):
    n = len(graph.positions)
    with pytest.raises((ValueError, RuntimeError)) as caught:
        jax.block_until_ready(energy(model_of(WrongOutputs("rows")), graph))
    text = f"output ['position_gradients']: expected float32 ({n + 1}, 3), got float32 (1000, 3)"
    assert text in str(caught.value)


def test_float_outputs_are_cast_and_extra_keys_dropped(graph):
    double = energy(model_of(WrongOutputs("double")), graph)
    assert double.dtype == jnp.float32
    np.testing.assert_array_equal(double, np.float32(0.1))
    assert energy(model_of(WrongOutputs("extra")), graph).tolist() == [0.0]
    text = "output ['energy']: expected float32 (2,), got int64 (2,)"
    with pytest.raises((ValueError, RuntimeError)) as caught:
        jax.block_until_ready(energy(model_of(WrongOutputs("int")), graph))
    assert text in str(caught.value)


def test_count_beyond_the_capacity_is_named_in_the_error(graph):
    padded, masks = pad_graph(graph, cutoff=CUTOFF)
    model = model_of(ReportsSizes())
    for count in (-1, 10**6):
        with pytest.raises((ValueError, RuntimeError), match=r"length n_edges: expected 0 to"):
            jax.block_until_ready(model.evaluate(padded, masks.n_atoms, jnp.int32(count)))


def test_inputs_of_a_users_own_wrapper_are_narrowed(graph):
    model = model_of(ReportsSizes())
    own = TorchMliap(model.cutoff, TorchModuleWrapper(graphs.script(Counts())))
    assert seen(energy(own, graph)[0]) == (len(graph.positions) + 1, int(graph.n_edges) + 1)


class Counts(torch.nn.Module):
    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos, index = input["pos"], input["edge_index"]
        energy = input["charge"] + 10000.0 * pos.size(0) + index.size(1)
        return {"energy": energy, "position_gradients": pos}
