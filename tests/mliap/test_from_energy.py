"""Potentials made from modules that return energies only, in every engine."""

import pickle
import threading
from dataclasses import replace

import ase.neighborlist
import engines
import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from engines import package  # noqa: F401
from reference import CUTOFF, one_thread  # noqa: F401

import torchcall.models
from torchcall.mliap import (
    TorchMliap,
    edge_vectors,
    energy_and_gradients,
    pad_graph,
    with_gradients,
)
from torchcall.mliap._compile._form import INPUTS, sizes_of
from torchcall.mliap._compile._small import small_example

pytestmark = pytest.mark.usefixtures("x64")
KINDS = ["triclinic", "left-handed", "slab", "slab with a vacuum vector", "wire", "molecule"]


class Pairs(torch.nn.Module):
    """Energies of the Lennard-Jones example, by its pair function only."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = reference.example("lennard_jones").LennardJones(**reference.LJ)
        self.cutoff = CUTOFF
        self.species = [14, 6]

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        r = edge_vectors(input)
        system = input["batch"].index_select(0, input["edge_index"][0])
        energy, _ = self.pairs.pair((r * r).sum(1))
        return torch.zeros_like(input["charge"]).index_add(0, system, energy)


class InDict(Pairs):
    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        r = edge_vectors(input)
        system = input["batch"].index_select(0, input["edge_index"][0])
        energy, _ = self.pairs.pair((r * r).sum(1))
        return {"energy": torch.zeros_like(input["charge"]).index_add(0, system, energy)}


class Weighted(torch.nn.Module):
    """A network whose layers take inputs of the weights' dtype only, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
            )

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        r = edge_vectors(input)
        per_edge = self.layers(torch.exp(-(r * r).sum(1, keepdim=True) / 4)).squeeze(1)
        system = input["batch"].index_select(0, input["edge_index"][0])
        zeros = torch.zeros(input["cell"].size(0), dtype=per_edge.dtype)
        return zeros.index_add(0, system, per_edge)


class Unscriptable(Pairs):
    def forward(self, input):
        kinds = {f"{n}" for n in range(3)}  # TorchScript has no sets
        return len(kinds) / 3 * Pairs.forward(self, input)


class Composition(torch.nn.Module):
    """An energy for each element, independent of positions."""

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        per_atom = 0.5 * input["atomic_numbers"].to(input["pos"].dtype)
        return torch.zeros_like(input["charge"]).index_add(0, input["batch"], per_atom)


class Confined(Composition):
    """A spring to the origin: depends on positions, not on the cell."""

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        per_atom = (input["pos"] * input["pos"]).sum(1)
        return torch.zeros_like(input["charge"]).index_add(0, input["batch"], per_atom)


@pytest.fixture(scope="module")
def graph():
    with jax.enable_x64(True):
        return graphs.atom_graph([reference.systems()[kind] for kind in KINDS], slots=5)


def assert_close(found, expected, tolerance=1e-12):
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * abs(want).max())


# Values


@pytest.mark.parametrize("module", [Pairs(), InDict()], ids=["tensor", "dict"])
@pytest.mark.parametrize("engine", ["eager", "script"])
def test_gradients_equal_those_by_formulas(engine, module, graph):
    model = TorchMliap.from_energy(module, engine=engine)
    found = energy_and_gradients(model, graph)
    assert_close(found, energy_and_gradients(graphs.potential("Lennard-Jones"), graph))
    assert model.species == (6, 14)
    assert float(model.cutoff.data[0]) == CUTOFF
    assert model.compute_cell_gradients


@pytest.mark.parametrize("kind", ["triclinic", "slab"])
def test_gradients_equal_finite_differences(kind):
    module, system = with_gradients(Weighted().double().eval()), reference.systems()[kind]
    by_cell = reference.cell_derivative(module, system, fixed="cartesian")
    by_cell = np.where(system.pbc[:, None], by_cell, 0)
    by_position = reference.position_derivative(module, system)
    # The energy jumps at the list's end, so use the list of the finite differences.
    out = module(reference.graph([system], reach=CUTOFF + 0.1))
    np.testing.assert_allclose(out["position_gradients"][:-1], by_position, rtol=0, atol=1e-8)
    np.testing.assert_allclose(out["cell_gradients"][0], by_cell, rtol=0, atol=1e-8)


def test_edge_vectors_equal_ase():
    system = reference.systems()["triclinic"]
    atoms = ase.Atoms(system.numbers, system.positions, cell=system.cell, pbc=system.pbc)
    found = edge_vectors(reference.graph([system], phantom=False))
    np.testing.assert_allclose(
        found, ase.neighborlist.neighbor_list("D", atoms, CUTOFF), rtol=0, atol=1e-12
    )


def test_single_precision_is_accurate_far_from_the_origin():
    member = reference.systems()["triclinic"]
    far = member.moved(np.float32(member.positions + 1000.0).astype(float), member.cell)
    graph = reference.graph([far])
    expected = with_gradients(Pairs())(graph)
    single = {k: v.float() if v.is_floating_point() else v for k, v in graph.items()}
    found = with_gradients(Pairs())(single)
    for key, value in expected.items():
        size = float(value.abs().max())
        torch.testing.assert_close(found[key].double(), value, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("engine", ["eager", "script"])
def test_independent_energies_have_zero_gradients(engine, graph):
    composition = TorchMliap.from_energy(Composition(), CUTOFF, engine=engine)
    out = energy_and_gradients(composition, graph)
    numbers = np.asarray(graph.atomic_numbers, float)
    np.testing.assert_allclose(out.energy, 0.5 * np.bincount(graph.batch, numbers))
    assert not np.asarray(out.position_gradients).any()
    assert not np.asarray(out.cell_gradients).any()
    confined = TorchMliap.from_energy(Confined(), CUTOFF, engine=engine)
    out = energy_and_gradients(confined, graph)
    np.testing.assert_allclose(out.position_gradients, 2 * graph.positions)
    assert not np.asarray(out.cell_gradients).any()


# Engines


def test_auto_scripts_where_it_can_and_reports_where_it_cannot(graph):
    scripted = TorchMliap.from_energy(Pairs())
    assert scripted.wrapper.stats()["engine"] == "TorchScript"
    assert scripted.wrapper.stats()["fallback"] is None
    assert "TorchModuleWrapper(Pairs, TorchScript" in repr(scripted.wrapper)
    eager = TorchMliap.from_energy(Unscriptable())
    assert eager.wrapper.stats()["engine"] == "eager"
    assert "TorchScript does not compile" in eager.wrapper.stats()["fallback"]
    assert "TorchScript does not compile" in repr(eager.wrapper)
    assert_close(energy_and_gradients(eager, graph), energy_and_gradients(scripted, graph))
    with pytest.raises(ValueError, match=r"torchcall: Unscriptable: engine='script': expected"):
        TorchMliap.from_energy(Unscriptable(), engine="script")


@pytest.mark.parametrize("engine", ["eager", "script"])
def test_scripted_modules_are_differentiated_too(engine, graph):
    model = TorchMliap.from_energy(torch.jit.script(Pairs()), engine=engine)
    expected = energy_and_gradients(TorchMliap.from_energy(Pairs()), graph)
    assert_close(energy_and_gradients(model, graph), expected)
    assert model.species == (6, 14)
    with pytest.raises(TypeError, match=r"got a torch.jit.ScriptModule, which torch cannot export"):
        TorchMliap.from_energy(torch.jit.script(Pairs()), engine="package")


@pytest.mark.slow
def test_package_is_compiled_into_the_cache(graph, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCHCALL_PROGRESS", "0")
    model = TorchMliap.from_energy(Pairs(), dtype="float64", engine="package")
    expected = energy_and_gradients(TorchMliap.from_energy(Pairs()), graph)
    assert_close(energy_and_gradients(model, graph), expected)
    assert model.species == (6, 14)
    assert model.capacity is None
    assert model.wrapper.stats()["engine"] == "AOTInductor"
    (entry,) = tmp_path.iterdir()
    written = entry.stat().st_mtime_ns
    again = TorchMliap.from_energy(Pairs(), dtype="float64", engine="package")
    assert_close(energy_and_gradients(again, graph), expected)
    assert [path.stat().st_mtime_ns for path in tmp_path.iterdir()] == [written]


def test_engine_package_uses_a_small_example(package, graph, monkeypatch):  # noqa: F811
    """The compiled package is the one of the other tests."""
    calls = []

    def run(module, path, **options):
        calls.append((module, path, options))
        return package

    monkeypatch.setattr("torchcall.mliap._compile._run.run", run)
    model = TorchMliap.from_energy(Pairs(), dtype="float64", engine="package")
    assert_close(
        energy_and_gradients(model, graph),
        energy_and_gradients(TorchMliap.from_energy(Pairs()), graph),
    )
    ((module, path, options),) = calls
    assert (type(module), path, options["dynamic"]) == (Pairs, None, True)
    assert options["example"]["pos"].dtype == torch.float64
    TorchMliap.from_energy(Pairs(), engine="package", example=graph, second_derivatives=True)
    assert calls[1][2]["example"] is graph
    assert [options["second_derivatives"] for *_, options in calls] == [False, True]
    assert calls[1][2]["dynamic"] == "auto"
    assert not calls[1][2]["progress"].shown
    for verbose in (True, False):
        torchcall.models.load(
            Pairs(), dtype="float64", engine="package", device="cpu", verbose=verbose
        )
        assert calls[-1][2]["progress"].shown is verbose


@pytest.mark.parametrize("species", [None, (6, 14), tuple(range(1, 12))])
def test_small_example_is_a_valid_graph_with_forces(species):
    found = small_example(CUTOFF, species, torch.float64)
    assert list(found) == list(INPUTS)
    assert sizes_of(found)["E"] > 50
    r, offsets, batch = edge_vectors(found).norm(dim=1), found["cell_offsets"], found["batch"]
    assert (r[:-3] < CUTOFF).all()
    assert (r[:-3] > 0.3 * CUTOFF).all()
    assert (r[-3:] >= CUTOFF).all()
    assert (batch[found["edge_index"][0]] == batch[found["edge_index"][1]]).all()
    assert (offsets == offsets.round()).all()
    assert set(found["atomic_numbers"].tolist()) <= set(species or (1,))


def test_unknown_elements_are_errors_in_every_engine(graph, package):  # noqa: F811
    wrong = replace(graph, atomic_numbers=graph.atomic_numbers.at[3].set(8))
    models = [TorchMliap.from_energy(Pairs(), engine=engine) for engine in ("eager", "script")]
    for model in (*models, engines.potential("AOTInductor", package)):
        with pytest.raises(ValueError, match="expected one of 6, 14, got 8 at entry 3"):
            energy_and_gradients(model, wrong)


# The module, its weights and its mode


@pytest.mark.parametrize("engine", ["eager", "script"])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_inputs_are_cast_to_the_weights_dtype(engine, weights):
    model = TorchMliap.from_energy(Weighted().to(weights), CUTOFF, engine=engine)
    exact = TorchMliap.from_energy(Weighted(), CUTOFF, engine=engine, dtype="float64")
    for positions in (np.float32, np.float64):
        given = graphs.atom_graph([reference.systems()[k] for k in KINDS], dtype=positions)
        found = energy_and_gradients(model, given)
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {np.dtype(positions)}
        is_double = (weights, positions) == (torch.float64, np.float64)
        assert_close(
            [np.float64(leaf) for leaf in found],
            energy_and_gradients(exact, graphs.atom_graph([reference.systems()[k] for k in KINDS])),
            1e-13 if is_double else 3e-6,
        )


def test_the_callers_module_is_not_changed(graph):
    module = Weighted().train()
    model = TorchMliap.from_energy(module, CUTOFF, dtype="float64")
    first, second = (energy_and_gradients(model, graph) for _ in range(2))
    assert_close(first, second, 0)  # no dropout
    assert module.training
    assert module.layers[2].training
    assert {w.dtype for w in module.parameters()} == {torch.float32}
    assert all(w.requires_grad and w.grad is None for w in module.parameters())
    with torch.no_grad():
        module.layers[3].weight.zero_()
    assert_close(energy_and_gradients(model, graph), first, 0)


def test_with_gradients_can_be_scripted_and_pickled():
    example = reference.graph([reference.systems()["triclinic"]])
    module = with_gradients(Pairs().eval())
    scripted = torch.jit.script(module)
    for one in (module, scripted):
        assert (one.cutoff, one.species) == (CUTOFF, [6, 14])
    pairs = [(scripted, module)]
    network = with_gradients(Weighted().eval())
    pairs.append((pickle.loads(pickle.dumps(network)), network))
    for found, expected in ((copy(dict(example)), own(example)) for copy, own in pairs):
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-12)
            assert not value.requires_grad


def test_with_gradients_follows_a_cast():
    example = reference.graph([reference.systems()["triclinic"]])
    module = with_gradients(Weighted().eval())
    single, double = module(example), module.double()(example)
    assert single["energy"].dtype == double["energy"].dtype == torch.float64
    assert not torch.equal(single["energy"], double["energy"])
    torch.testing.assert_close(single["energy"], double["energy"], rtol=1e-5, atol=1e-5)


# Errors


@pytest.mark.parametrize(
    "arguments, options, text",
    [
        ((Weighted(),), {}, r"Weighted: cutoff: .* no attribute `cutoff`; pass from_energy"),
        ((Weighted(), -1.0), {}, "cutoff: expected a positive length"),
        ((Weighted(), 4.0), {"engine": "fast"}, "engine: expected 'auto', 'eager', 'script' or"),
        ((Weighted(), 4.0), {"dtype": "int32"}, "dtype: expected float32 or float64"),
        ((Weighted, 4.0), {}, "module: expected a torch.nn.Module, got the class Weighted"),
        ((len, 4.0), {}, "module: expected a torch.nn.Module, got builtin_function"),
        ((Weighted(), 4.0), {"output_spec": None}, "from_energy: output_spec is fixed"),
    ],
)
def test_wrong_arguments_are_errors(arguments, options, text):
    with pytest.raises((TypeError, ValueError), match=f"^torchcall: .*{text}"):
        TorchMliap.from_energy(*arguments, **options)


def test_static_packages_need_an_example(monkeypatch):
    from torchcall._compile._errors import CompileError

    def run(*_, **__):
        raise CompileError("torchcall: Pairs: compile: dynamic: expected any shapes")

    monkeypatch.setattr("torchcall.mliap._compile._run.run", run)
    with pytest.raises(CompileError, match=r"from_energy\(…, example=graph\)"):
        TorchMliap.from_energy(Pairs(), engine="package")


def test_no_example_is_asked_for_where_none_would_help():
    from torchcall._compile._errors import CompileError

    class Reading(Pairs):
        def forward(self, input):
            return super().forward(input) * float(input["pos"].sum())

    with pytest.raises(CompileError, match="the module cannot be traced") as caught:
        TorchMliap.from_energy(Reading(), engine="package")
    assert "example=" not in str(caught.value)


def test_padding_is_passed_through(graph):
    """Phantoms get energies too, and only they."""
    model = TorchMliap.from_energy(Pairs())
    padded, _ = pad_graph(graph, cutoff=CUTOFF, n_atoms=60, n_edges=3000, n_systems=9)
    out = model.call(padded)
    assert out["energy"].shape == (9,)
    np.testing.assert_array_equal(out["energy"][6:], jnp.zeros(3))


def test_calls_without_autograd_are_errors_not_zero_forces():
    example = reference.graph([reference.systems()["triclinic"]])
    for module in (with_gradients(Pairs()), torch.jit.script(with_gradients(Pairs()))):
        with torch.no_grad(), pytest.raises(Exception, match="expected requires_grad=True"):
            module(example)
        with pytest.raises(ValueError, match=r"Pairs: .*expected requires_grad=True"):
            TorchMliap.from_module(module, CUTOFF, requires_grad=False)


def test_threads_script_classes_of_one_name():
    models, errors, start = [], [], threading.Barrier(4)

    def work():
        start.wait()
        try:
            models.append(TorchMliap.from_energy(Pairs(), engine="script"))
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert not errors
    assert len(models) == 4
