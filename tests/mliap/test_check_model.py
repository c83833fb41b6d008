"""`check_model` passes correct potentials and names the fault of each faulty one."""

from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from engines import package  # noqa: F401
from faulty import CELL, FAULTS, POSITIONS, PRECISION, Faulty
from reference import CUTOFF, System, one_thread  # noqa: F401

from torchcall.mliap import TorchMliap, _calls, check_model
from torchcall.mliap._check._trial import Trial

DTYPES = ["float64", "float32"]


class Shifted(torch.nn.Module):
    """The Lennard-Jones example, and an energy per atom, and a fast oscillation of each pair."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = reference.potentials()["Lennard-Jones"]
        self.shift, self.length = 0.0, None

    def forward(self, input):
        energy, *gradients = self.inner(input).values()
        count = torch.zeros_like(energy).index_add(0, input["batch"], 0 * input["pos"][:, 0] + 1)
        energy = energy + self.shift * count
        if self.length is not None:
            pos = input["pos"].detach().requires_grad_(True)
            cell = input["cell"].detach().requires_grad_(True)
            with torch.enable_grad():
                fast = self.oscillation(input, pos, cell)
                more = torch.autograd.grad([fast.sum()], [pos, cell])
            energy = energy + fast.detach()
            gradients = [a + b for a, b in zip(gradients, more, strict=True)]
        return {
            "energy": energy,
            "position_gradients": gradients[0],
            "cell_gradients": gradients[1],
        }

    def oscillation(self, input, pos, cell):
        (i, j), system = input["edge_index"], input["batch"]
        shift = (input["cell_offsets"].unsqueeze(1) @ cell[system[i]]).squeeze(1)
        d = (pos[j] - pos[i] + shift).square().sum(1).sqrt()
        wave = self.length * (1 - d / CUTOFF).clamp(min=0).pow(4) * torch.sin(d / self.length)
        return torch.zeros_like(cell[:, 0, 0]).index_add(0, system[i], wave)


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request):
    """A dtype of positions, with 64-bit JAX types where it is float64."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture(scope="module")
def shifted(dtype):
    """An eager module; its parameters change between calls of one program."""
    module = Shifted()
    model = TorchMliap.from_module(module, CUTOFF, True)
    # The cutoff's dtype follows the 64-bit types that `dtype` set.
    assert model.cutoff.data.dtype == dtype
    return module, model


@pytest.fixture(scope="module")
def faulty(dtype):
    module = Faulty(CUTOFF)
    systems = reference.systems()
    graph = graphs.atom_graph([systems["triclinic"], systems["slab"]], slots=3, dtype=dtype)
    return module, TorchMliap.from_module(module, CUTOFF, True), graph


@pytest.fixture
def graph():
    systems = reference.systems()
    return graphs.atom_graph([systems["triclinic"], systems["slab"]], slots=3)


@pytest.fixture(scope="module")
def batch(dtype):
    """A batch of every kind of system."""
    return graphs.atom_graph(list(reference.systems().values()), dtype=dtype)


def unwrapped(graph, far, seed=0):
    """The graph with each atom up to `far` lattice vectors away."""
    system, cell = np.asarray(graph.batch), np.asarray(graph.cell, float)
    steps = np.random.default_rng(seed).integers(-far, far + 1, graph.positions.shape)
    steps = steps * np.asarray(graph.pbc)[system]
    positions = np.asarray(graph.positions, float)
    positions = positions + np.einsum("nk,nkl->nl", steps, cell[system])
    count = int(graph.n_edges)
    i, j = np.asarray(graph.edge_index)[:, :count]
    offsets = np.array(graph.cell_offsets, float)
    offsets[:count] += steps[i] - steps[j]
    dtype = graph.positions.dtype
    return replace(
        graph, positions=jnp.asarray(positions, dtype), cell_offsets=jnp.asarray(offsets, dtype)
    )


def assert_passes(model, graph):
    report = check_model(model, graph)
    assert report.ok, str(report)
    assert not report.failures
    return report


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["message passing", "Stillinger-Weber"])
def test_a_correct_potential_passes(graph, name):
    report = assert_passes(graphs.potential(name), graph)
    assert len(report.findings) == 12
    assert any("does not declare its elements" in note for note in report.notes)


@pytest.mark.parametrize("far", [0, 1, 5, 11, 300])
def test_unwrapped_atoms_pass(shifted, batch, far):
    module, model = shifted
    module.shift, module.length = 0.0, None
    report = assert_passes(model, unwrapped(batch, far))
    by_name = {finding.requirement.split()[0]: finding.error for finding in report.findings}
    assert by_name["cell_gradients"] < (1e-9 if batch.positions.dtype == "float64" else 5e-4)


def test_wrapping_does_not_change_the_system(shifted, batch):
    module, model = shifted
    module.shift, module.length = 0.0, None
    near, far = (Trial(model, unwrapped(batch, far), 0) for far in (0, 11))
    assert far.largest_offset <= 2
    assert np.abs(far.images).max() >= 10
    tolerance = 1e-11 if batch.positions.dtype == "float64" else 1e-3
    np.testing.assert_allclose(far.out.energy, near.out.energy, rtol=tolerance)
    np.testing.assert_allclose(
        far.out.position_gradients, near.out.position_gradients, atol=20 * tolerance
    )
    # Displacements of the check are exact: each is a multiple of the quantum.
    moved = np.asarray(near.array(np.asarray(near.graph.positions, float) + 7 * near.quantum))
    np.testing.assert_array_equal(
        moved.astype(float) - np.asarray(near.graph.positions, float), 7 * near.quantum
    )


@pytest.mark.parametrize("shift", [-1e2, -1e3])
def test_large_total_energies_pass(shifted, batch, shift):
    module, model = shifted
    module.shift, module.length = shift, None
    assert_passes(model, batch)


def test_energies_too_large_for_the_dtype_are_reported_as_such(shifted, batch):
    module, model = shifted
    module.shift, module.length = -1e6, None
    report = check_model(model, batch)
    if batch.positions.dtype == "float64":
        assert report.ok, str(report)
        assert any("energies have errors of" in note for note in report.notes)
        return
    requirements = [finding.requirement for finding in report.failures]
    assert [name.split()[0] for name in requirements] == ["position_gradients", "cell_gradients"]
    for finding in report.failures:
        assert "grows as the step shrinks" in finding.advice
        assert "Use float64" in finding.advice


@pytest.mark.parametrize("length", [0.1, 1e-3])
def test_a_stiff_potential_passes(shifted, batch, length):
    module, model = shifted
    module.shift, module.length = 0.0, length
    if batch.positions.dtype == "float32":
        module.length = 0.1  # float32 does not resolve shorter ones
    assert_passes(model, batch)


def test_small_cells_symmetric_sites_and_single_atoms_pass(shifted, dtype):
    module, model = shifted
    module.shift, module.length = -5.0, None
    periodic, open_ = np.ones(3, bool), np.zeros(3, bool)
    fcc = 1.55 * np.array([[0.0, 1, 1], [1, 0, 1], [1, 1, 0]])
    flat = np.array([[1.9, 0, 0], [0.3, 2.2, 0], [0, 0.2, 60.0]])
    water = np.array([[500.0, 0, 0], [502.3, 0, 0], [501, 2, 0.3]])
    origin = np.zeros((1, 3))
    members = [
        System(origin, np.array([14]), fcc, periodic),
        System(origin + 0.3, np.array([6]), flat, periodic),
        System(origin, np.array([14]), np.zeros((3, 3)), open_),
        System(water, np.array([14, 6, 6]), np.zeros((3, 3)), open_),
    ]
    graph = graphs.atom_graph(members, dtype=dtype)
    assert np.abs(np.asarray(graph.cell_offsets)).max() >= 2
    assert_passes(model, graph)


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_explained(faulty, fault):
    module, model, graph = faulty
    module.fault = fault
    requirement, advice = FAULTS[fault]
    report = check_model(model, graph)
    found = [finding for finding in report.failures if requirement in finding.requirement]
    assert found, str(report)
    assert advice in found[0].advice, str(report)
    assert "FAIL" in str(report)
    assert found[0].advice in str(report)
    if requirement in (POSITIONS, CELL) and fault != "detached":
        assert report.failures == tuple(found), str(report)


@pytest.mark.parametrize("fault", ["single precision", "half precision"])
def test_lower_precision_inside_the_model_is_found(faulty, fault, dtype):
    module, model, graph = faulty
    module.fault = fault
    report = check_model(model, graph)
    expected = PRECISION.get((fault, dtype))
    if expected is None:
        assert report.ok, str(report)
        return
    found = [finding for finding in report.failures if expected[0] in finding.requirement]
    assert found, str(report)
    assert expected[1] in found[0].advice
    if fault == "single precision":
        assert report.failures == tuple(found), str(report)


def test_the_same_potential_without_a_fault_passes(faulty):
    module, model, graph = faulty
    module.fault = ""
    report = assert_passes(model, graph)
    assert len(report.findings) == 14
    limited = any("float64 would check more" in note for note in report.notes)
    assert limited == (graph.positions.dtype == "float32")


def test_an_accepted_undeclared_element_is_found(faulty, monkeypatch):
    module, _, graph = faulty
    module.fault = ""
    # As if nothing checked the numbers.
    monkeypatch.setattr(TorchMliap, "check_species", lambda *_: None)
    monkeypatch.setattr(_calls, "_index_checks", lambda *_: ())
    model = TorchMliap.from_module(module, CUTOFF, True)
    report = check_model(model, graph)
    assert [f.requirement for f in report.failures] == [
        "an element that the model does not declare is refused"
    ]
    assert "Element 1 got an energy" in report.failures[0].advice


def test_a_graph_of_numpy_arrays_passes(faulty):
    module, model, graph = faulty
    module.fault = ""
    assert_passes(model, jax.tree.map(np.asarray, graph))


@pytest.mark.usefixtures("x64")
def test_a_package_passes(graph, package):  # noqa: F811
    model = TorchMliap.from_package(package)
    report = check_model(model, graph)
    # It declares two elements, and is the same for both.
    assert [finding.requirement for finding in report.failures] == [
        "the elements that the model declares differ"
    ], str(report)


def test_a_potential_without_cell_gradients_passes():
    module = reference.example("lennard_jones").LennardJones(**reference.LJ)
    model = TorchMliap.from_module(graphs.script(module), CUTOFF, requires_grad=False)
    graph = graphs.atom_graph([reference.systems()["wire"]], dtype=np.float32)
    report = assert_passes(replace(model, capacity=(20, 400, 3)), graph)
    assert any("does not compute them" in note for note in report.notes)


@pytest.mark.usefixtures("x64")
def test_a_graph_without_atoms_passes():
    module = reference.potentials()["Lennard-Jones"]
    model = TorchMliap.from_module(graphs.script(module), CUTOFF, True, requires_grad=False)
    nothing = System(np.zeros((0, 3)), np.zeros(0, int), np.eye(3) * 5, np.ones(3, bool))
    assert_passes(model, graphs.atom_graph([nothing], slots=2))
