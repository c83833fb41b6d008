"""Padding: order and phantoms are as documented, and no real result depends on them."""

from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from reference import CUTOFF, System, one_thread  # noqa: F401

from torchcall.mliap import (
    AtomGraph,
    TorchMliap,
    _graph,
    energy_and_gradients,
    neighbor_list,
    pad_graph,
)

pytestmark = pytest.mark.usefixtures("x64")


class PaddingSensitive(torch.nn.Module):
    """Looks up atomic numbers, divides by distances, normalises per system: padding would show."""

    def __init__(self, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        generator = torch.Generator().manual_seed(3)
        table = torch.rand(20, generator=generator, dtype=torch.float64)
        self.register_buffer("table", table)

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos = input["pos"].detach().requires_grad_(True)
        cell = input["cell"].detach().requires_grad_(True)
        i, j, batch = input["edge_index"][0], input["edge_index"][1], input["batch"]
        shift = (input["cell_offsets"].unsqueeze(1) @ cell[batch[i]]).squeeze(1)
        r = (pos[j] - pos[i] + shift).square().sum(1).sqrt()
        x = (r / self.cutoff).clamp(max=1.0)
        q = self.table[input["atomic_numbers"]]
        pair = q[i] * q[j] / r * (1.0 - x).pow(3)
        nil = torch.zeros(cell.size(0), dtype=pos.dtype)
        total = nil.index_add(0, batch[i], pair)
        count = nil.index_add(0, batch, torch.ones_like(q)).clamp(min=1.0)
        energy = total / count * (1.0 + input["charge"]) + input["spin"] * total.square()
        g = torch.autograd.grad([energy.sum()], [pos, cell])
        by_pos, by_cell = g[0], g[1]
        assert by_pos is not None
        assert by_cell is not None
        return {
            "energy": energy.detach(),
            "position_gradients": by_pos,
            "cell_gradients": by_cell,
        }


LONE = System(np.zeros((1, 3)), np.array([14]), np.eye(3) * 30.0, np.ones(3, bool))
EMPTY = System(np.zeros((0, 3)), np.array([], int), np.eye(3) * 9.0, np.ones(3, bool))
MODELS = ["Lennard-Jones", "Stillinger-Weber", "message passing", "padding-sensitive"]


@pytest.fixture(scope="module")
def models():
    made = {name: graphs.potential(name) for name in MODELS[:-1]}
    script = graphs.script(PaddingSensitive(CUTOFF))
    return made | {"padding-sensitive": TorchMliap.from_module(script, CUTOFF, True)}


@pytest.fixture(scope="module")
def members():
    systems = reference.systems()
    return [EMPTY, systems["triclinic"], LONE, systems["slab"], systems["molecule"], EMPTY]


def evaluate(model, graph, sizes=None):
    """Energies and gradients of the caller's atoms, evaluated with the given capacities."""
    if sizes is None:
        return jax.tree.map(np.asarray, tuple(energy_and_gradients(model, graph)))
    padded, masks = pad_graph(graph, cutoff=model.cutoff, **sizes)
    out, b = model.call(padded), len(graph.cell)
    rows = np.asarray(masks.rows)
    gradients = np.where((rows < masks.n_atoms)[:, None], out["position_gradients"][rows], 0)
    return np.asarray(out["energy"][:b]), gradients, np.asarray(out["cell_gradients"][:b])


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * max(1.0, abs(y).max()))


def with_charges(graph):
    b = len(graph.cell)
    charge, spin = np.linspace(-0.5, 0.5, b), np.linspace(0.1, 0.2, b)
    return replace(graph, charge=jnp.asarray(charge), spin=jnp.asarray(spin))


@pytest.mark.parametrize("name", MODELS)
def test_results_do_not_depend_on_capacity_order_or_padding(models, members, name):
    model, graph = models[name], with_charges(graphs.atom_graph(members))
    expected = evaluate(model, graph)
    assert all(np.isfinite(x).all() for x in expected)
    n, b, e = len(graph.positions), len(graph.cell), graph.edge_index.shape[1]
    sizes = [
        {},
        {"n_atoms": n + 9, "n_edges": 2 * e, "n_systems": b + 4},
        {"n_edges": e + 1},
    ]
    for each in sizes:
        assert_same(evaluate(model, graph, each), expected)
    roomy = with_charges(graphs.atom_graph(members, slots=50))
    assert_same(evaluate(model, roomy), expected)
    for seed, padding in ((1, 0), (2, 11)):
        mixed, places = graphs.shuffled(graph, seed, padding=padding)
        mixed = replace(mixed, charge=graph.charge, spin=graph.spin)
        energies, gradients, cells = evaluate(model, mixed)
        assert_same((energies, gradients[places], cells), expected)
        assert not np.delete(gradients, places, axis=0).any()


@pytest.mark.parametrize("name", MODELS)
def test_results_do_not_depend_on_the_order_of_the_systems(models, members, name):
    model, order = models[name], [3, 0, 4, 2, 1, 5]
    energies, gradients, cells = evaluate(model, graphs.atom_graph(members))
    first = np.cumsum([0, *(len(m.numbers) for m in members)])
    rows = np.concatenate([np.arange(first[k], first[k + 1]) for k in order])
    found = evaluate(model, graphs.atom_graph([members[k] for k in order]))
    assert_same(found, (energies[order], gradients[rows], cells[order]))


@pytest.mark.parametrize(
    "few",
    [
        pytest.param([], id="no systems"),
        pytest.param([EMPTY], id="one empty system"),
        pytest.param([LONE], id="one atom"),
        pytest.param([LONE, EMPTY, LONE], id="atoms without edges"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_nearly_empty_graphs_have_finite_energies_and_zero_gradients(models, name, few):
    if few:
        graph = graphs.atom_graph(few)
    else:
        graph = AtomGraph(
            positions=jnp.zeros((0, 3)),
            atomic_numbers=jnp.zeros(0, jnp.int32),
            cell=jnp.zeros((0, 3, 3)),
            pbc=jnp.zeros((0, 3), bool),
            batch=jnp.zeros(0, jnp.int32),
            edge_index=jnp.zeros((2, 0), jnp.int32),
            cell_offsets=jnp.zeros((0, 3)),
        )
    energies, gradients, cells = evaluate(models[name], graph)
    assert np.isfinite(energies).all()
    assert energies.shape == (len(few),)
    assert gradients.shape == (sum(len(m.numbers) for m in few), 3)
    assert not gradients.any()
    assert not cells.any()


def test_padded_layout_is_as_documented(members):
    graph, places = graphs.shuffled(graphs.atom_graph(members, slots=3), 5, padding=4)
    graph = with_charges(graph)
    sizes = {"n_atoms": 40, "n_edges": 900, "n_systems": 9}
    padded, masks = pad_graph(graph, cutoff=jnp.asarray([3.0, CUTOFF]), **sizes)
    n, b, e = len(places), len(members), int(graph.n_edges)
    p = int(masks.n_atoms)
    assert (p, int(masks.n_edges)) == (n, e)
    batch = np.asarray(padded["batch"])
    assert (np.diff(batch) >= 0).all()
    assert (batch[p:] == b).all()
    assert (np.asarray(masks.atoms) == (np.arange(40) < p)).all()
    assert (np.asarray(masks.edges) == (np.arange(900) < e)).all()
    assert (np.asarray(masks.systems) == (np.arange(9) < b)).all()
    np.testing.assert_array_equal(padded["pos"][masks.rows[places]], graph.positions[places])
    assert not np.asarray(padded["pos"][p:]).any()
    numbers = np.asarray(padded["atomic_numbers"])
    assert (numbers[p:] == members[1].numbers[0]).all()
    assert (np.asarray(padded["edge_index"])[:, e:] == p).all()
    assert (np.asarray(padded["cell_offsets"])[e:] == [1, 0, 0]).all()
    np.testing.assert_array_equal(padded["cell"][b:], np.tile(np.eye(3) * 2 * CUTOFF, (3, 1, 1)))
    assert np.asarray(padded["pbc"])[b:].all()
    np.testing.assert_array_equal(padded["pbc"][:b], graph.pbc)
    np.testing.assert_array_equal(padded["charge"], np.append(graph.charge, [graph.charge[0]] * 3))
    np.testing.assert_array_equal(padded["spin"], np.append(graph.spin, [graph.spin[0]] * 3))
    # Edges point at the same atoms as before.
    index, offsets = np.asarray(padded["edge_index"])[:, :e], np.asarray(padded["cell_offsets"])[:e]
    cells, pos = np.asarray(padded["cell"]), np.asarray(padded["pos"])
    r = pos[index[1]] - pos[index[0]] + np.einsum("ek,ekl->el", offsets, cells[batch[index[0]]])
    i, j = np.asarray(graph.edge_index)[:, :e]
    x, h = np.asarray(graph.positions), np.asarray(graph.cell)
    s = np.asarray(graph.cell_offsets)[:e]
    here = x[j] - x[i] + np.einsum("ek,ekl->el", s, h[np.asarray(graph.batch)[i]])
    np.testing.assert_array_equal(r, here)


def test_neighbour_list_gives_the_same_graph_as_ase(models):
    system = reference.systems()["triclinic"]
    cell, positions = jnp.asarray(system.cell)[None], jnp.asarray(system.positions)
    with jax.enable_x64(False):
        single = (system.positions.astype(np.float32), system.cell.astype(np.float32)[None])
        one = np.zeros(8, np.int32)
        listed = neighbor_list(CUTOFF).allocate(*single, system.pbc[None], one)
    numbers = jnp.asarray(system.numbers.astype(np.int32))
    graph = AtomGraph.from_neighbors(listed, positions, cell, numbers)
    assert graph.list_cutoff == CUTOFF
    expected = evaluate(models["padding-sensitive"], graphs.atom_graph([system]))
    assert_same(evaluate(models["padding-sensitive"], graph), expected)
    one = replace(graph, batch=None)
    assert_same(evaluate(models["padding-sensitive"], one), expected)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"cell": jnp.eye(3)}, r"graph.cell: expected shape \(3, 3, 3\), got \(3, 3\)"),
        ({"pbc": jnp.ones(3, bool)}, r"graph.pbc: expected shape \(1, 3\), got \(3,\)"),
        ({"positions": jnp.ones((8, 3), int)}, "graph.positions: expected float32 or float64"),
        ({"edge_index": jnp.zeros((3, 2), int)}, r"graph.edge_index: expected shape \(2, 2\)"),
        ({"n_edges": jnp.zeros(1, int)}, r"graph.n_edges: expected shape \(\), got \(1,\)"),
        ({"charge": jnp.zeros(2)}, r"graph.charge: expected shape \(1,\), got \(2,\)"),
    ],
)
def test_fields_of_wrong_shape_or_dtype_are_named_in_the_error(change, text):
    graph = replace(graphs.atom_graph([reference.systems()["molecule"]]), **change)
    with pytest.raises((ValueError, TypeError), match=f"torchcall: {text}"):
        pad_graph(graph, cutoff=CUTOFF)


@pytest.mark.parametrize("axis", ["n_atoms", "n_edges", "n_systems"])
def test_capacities_that_are_too_small_are_named_in_the_error(axis):
    graph = graphs.atom_graph([reference.systems()["molecule"]])
    with pytest.raises(ValueError, match=f"torchcall: pad_graph: {axis}: expected at least"):
        pad_graph(graph, cutoff=CUTOFF, **{axis: 1})


def test_single_precision_graph_stays_in_single_precision():
    with jax.enable_x64(False):
        graph = graphs.atom_graph([reference.systems()["slab"]], dtype=np.float32)
        padded, masks = jax.jit(lambda g: pad_graph(g, cutoff=CUTOFF))(graph)
    floats = ("pos", "cell", "cell_offsets", "charge", "spin")
    assert all(padded[key].dtype == jnp.float32 for key in floats)
    assert padded["edge_index"].dtype == padded["batch"].dtype == masks.rows.dtype == jnp.int32


@pytest.mark.parametrize("name", ["atomic_numbers", "batch", "edge_index", "n_edges"])
def test_index_fields_that_are_not_integers_are_refused(name):
    graph = graphs.atom_graph([reference.systems()["slab"]])
    wrong = replace(graph, **{name: getattr(graph, name).astype(jnp.float32)})
    with pytest.raises(TypeError, match=rf"graph.{name}: expected integers, got float32"):
        pad_graph(wrong, cutoff=CUTOFF)


def test_fields_that_jax_drops_are_given_as_jax_0_8_1_and_newer_read_them():
    names = {"positions", "_listed"}
    assert names.difference(*_graph._DROPPED) == {"positions"}  # 0.8.1
    assert names.difference(_graph._DROPPED) == {"positions"}
