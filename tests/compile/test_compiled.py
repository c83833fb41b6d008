"""Compiled packages, in torch's loader, against eager modules, JAX and finite differences."""

import warnings

import jax
import numpy as np
import pytest
import reference
import torch
from energies import Soft
from engines import Energy, capacity_of

import torchcall
from torchcall._engines.package_file import read_package
from torchcall.mliap._compile._cases import dynamic_cases

CUTOFF = reference.CUTOFF
KINDS = ["triclinic", "left-handed", "slab", "slab with a vacuum vector", "wire", "molecule"]


def load(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._inductor.aoti_load_package(str(path))


@pytest.fixture(scope="module")
def loaded(package):
    return load(package)


def test_the_metadata_of_a_package_are_complete(package):
    found = read_package(package)
    assert (found.device, found.platform) == ("cpu", "linux")
    assert found.isa is not None
    own = found.torchcall
    assert own is not None
    assert own["torch"] == torch.__version__
    assert own["name"] == "Energy"
    assert own["user"]["species"] == [6, 14]
    assert own["user"]["kind"] == "mliap"
    assert own["user"]["cutoff"] == CUTOFF
    assert capacity_of(own) is None
    assert own["user"]["compute_cell_gradients"] is True
    assert own["axes"]["N"] == {"minimum": 2, "maximum": None, "capacity": None}
    by_name = {row["name"]: row for row in own["inputs"]}
    index = {"dtype": "int64", "shape": [2, "E"], "rows_of": "pos"}
    assert by_name["edge_index"] == {"name": "edge_index"} | index
    assert by_name["batch"]["rows_of"] == "cell"
    assert by_name["atomic_numbers"]["members"] == [6, 14]
    assert len(own["content"]) == 64
    assert own["gradients"] == ["pos", "cell"]


def test_a_package_returns_the_modules_results_for_any_shapes(loaded):
    members = [reference.systems()[kind] for kind in KINDS]
    module = reference.potentials()["Lennard-Jones"]
    graphs = [reference.graph(members[:k], n_atoms=k, n_edges=k + 1) for k in (1, 2, 6)]
    graphs += [case.graph for case in dynamic_cases(graphs[1], CUTOFF)]
    for k, graph in enumerate(graphs):
        out = loaded(graph)
        assert list(out) == ["energy", "position_gradients", "cell_gradients"]
        if k < 3:  # full lists: the module's analytic gradients need both directions of an edge
            for key, expected in module(graph).items():
                size = float(expected.abs().max())
                torch.testing.assert_close(out[key], expected, rtol=0, atol=1e-11 * size)
        assert all(torch.isfinite(value).all() for value in out.values())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ["triclinic", "wire"])
def test_a_package_returns_the_results_of_the_potential_in_jax(kind, loaded):
    member = reference.systems()[kind]
    energy = jax.value_and_grad(reference.lennard_jones(member), (0, 1))
    value, (by_position, by_cell) = energy(member.positions, member.cell)
    out = loaded(reference.graph([member]))
    np.testing.assert_allclose(out["energy"][0], value, rtol=1e-12)
    np.testing.assert_allclose(out["position_gradients"][:-1], by_position, rtol=0, atol=1e-10)
    np.testing.assert_allclose(out["cell_gradients"][0], by_cell, rtol=0, atol=1e-10)


def test_the_gradients_of_a_package_equal_finite_differences(loaded):
    member = reference.systems()["triclinic"]
    out = loaded(reference.graph([member]))
    by_position = reference.position_derivative(loaded, member)
    by_cell = reference.cell_derivative(loaded, member, fixed="cartesian")
    size = np.abs(by_position).max()
    np.testing.assert_allclose(
        out["position_gradients"][:-1], by_position, rtol=0, atol=1e-8 * size
    )  # fmt: skip
    size = np.abs(by_cell).max()
    np.testing.assert_allclose(out["cell_gradients"][0], by_cell, rtol=0, atol=1e-8 * size)


def test_a_single_atom_has_no_energy_and_no_forces(loaded):
    single = reference.System(np.zeros((1, 3)), np.array([18]), np.eye(3) * 30.0, np.ones(3, bool))
    graph = reference.graph([single], n_edges=2)
    assert [tuple(graph[key].shape) for key in ("pos", "edge_index", "cell")] == [
        (2, 3), (2, 2), (2, 3, 3)
    ]  # fmt: skip
    assert not any(value.any() for value in loaded(graph).values())


def test_the_same_module_comes_from_the_cache(package, tmp_path, monkeypatch):
    import torchcall._compile._run as run

    monkeypatch.setenv("TORCHCALL_CACHE", str(package.parent / "cache"))
    monkeypatch.setattr(run, "build", None)
    graph = reference.graph([reference.systems()["triclinic"]])
    path = torchcall.mliap.compile(
        Energy(), tmp_path / "m.pt2", example=graph, cutoff=CUTOFF, second_derivatives=True
    )
    assert path.read_bytes() == package.read_bytes()


def test_a_damaged_package_is_an_error(package, tmp_path):
    data, path = bytearray(package.read_bytes()), tmp_path / "m.pt2"
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.pt2: expected .* got a damaged file"):
        read_package(path)


@pytest.mark.slow
def test_a_static_package_in_single_precision_has_the_examples_capacity(tmp_path):
    members = [reference.systems()["triclinic"]]
    graph = reference.graph(members, n_atoms=4, n_edges=20, dtype=torch.float32)
    path = torchcall.mliap.compile(
        Soft(torch.float32), tmp_path / "m.pt2", example=graph, cutoff=CUTOFF, dynamic=False
    )
    own = read_package(path).torchcall
    assert own is not None
    assert capacity_of(own) == {"N": 12, "E": graph["edge_index"].shape[1], "B": 2}
    assert {row["dtype"] for row in own["outputs"]} == {"float32"}
    module = Soft()
    out, exact = load(path)(graph), {}
    double = {key: v.double() if v.is_floating_point() else v for key, v in graph.items()}
    pos, cell = double["pos"].requires_grad_(True), double["cell"].requires_grad_(True)
    energy = module(double | {"pos": pos, "cell": cell})
    gradients = torch.autograd.grad(energy.sum(), [pos, cell])
    exact["energy"] = energy.detach()
    exact |= dict(zip(("position_gradients", "cell_gradients"), gradients, strict=True))
    for key, value in out.items():
        assert value.dtype == torch.float32
        size = float(exact[key].abs().max())
        torch.testing.assert_close(value.double(), exact[key], rtol=0, atol=1e-5 * size)
