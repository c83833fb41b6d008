"""The demo in short runs: physics, options, output files, one-line errors."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import ase.io
import ase.neighborlist
import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk

import torchcall.demo
from torchcall.demo import _dynamics, _potential, _run, _system

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    """A structure file of 32 argon atoms near fcc sites."""
    atoms = bulk("Ar", "fcc", a=5.4, cubic=True).repeat(2)
    atoms.rattle(0.05, rng=np.random.default_rng(1))
    path = tmp_path_factory.mktemp("structures") / "crystal.xyz"
    ase.io.write(path, atoms)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The example potential as a file: differentiates internally, has an additional output."""
    path = tmp_path_factory.mktemp("models") / "lj.pt"
    lennard_jones = _system.load_example("lennard_jones").LennardJones
    module = lennard_jones(cutoff=5.0, autograd=True, cell_gradients=True)
    torch.jit.script(module).save(path)
    return path


@pytest.fixture
def run(capfd, tmp_path, monkeypatch):
    """Runs the demo in an empty folder; returns status, standard output and error."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        status = torchcall.demo.main([str(word) for word in argv])
        out, err = capfd.readouterr()
        return status, out, err

    return call


def only_line(err):
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    return lines[0]


def test_the_default_structure_is_liquid_argon_with_velocities():
    argon = _system.read_structure(_system.included_file("argon.xyz"), temperature=None, seed=0)
    assert argon.formula == "Ar500"
    assert argon.pbc.all()
    density = 500 / np.linalg.det(argon.cell)
    assert density == pytest.approx(0.0207, rel=0.01)
    kinetic = 0.5 * (argon.masses[:, None] * argon.velocities**2).sum()
    assert 2 * kinetic / (1497 * units.kB) == pytest.approx(94.4, abs=5.0)
    momentum = (argon.masses[:, None] * argon.velocities).sum(0)
    np.testing.assert_allclose(momentum, 0.0, atol=1e-2)


def test_energy_is_conserved_and_the_files_are_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr(_run, "_ROUNDS", 1)
    status, out, err = run("--steps", 250, "--json", "demo.json")
    assert status == 0, err
    document = json.loads((tmp_path / "demo.json").read_text())
    result = document["result"]
    assert abs(result["drift_mev_per_atom_per_ps"]) < 0.005
    assert result["fluctuation_mev_per_atom"] < 0.005
    assert result["temperature_k"] == pytest.approx(95.0, abs=8.0)
    assert result["steps"] == 250
    methods = [row["method"] for row in document["rows"]]
    assert methods == ["torchcall", "buffer_callback", "pure_callback"]
    assert all(row["us_median"] > 0 for row in document["rows"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "Ar500" in out
    assert "in one jitted lax.scan" in out
    assert "meV/atom/ps" in out
    assert "250/250" in err
    last = out.strip().splitlines()[-1]
    assert last.startswith("simulated 500 atoms for 0.5 ps, plotted in demo.png")


def test_the_users_structure_and_model(run, tmp_path, crystal, archive):
    options = ("--structure", crystal, "--model", archive, "--cutoff", 5.0, "--temperature", 30)
    status, out, err = run(
        *options, "--steps", 60, "--no-peers", "--picture", "own.png", "--json", "own.json"
    )
    assert status == 0, err
    assert "crystal.xyz: Ar32" in out
    assert "lj.pt" in out
    assert "buffer_callback" not in out
    assert (tmp_path / "own.png").exists()
    assert not (tmp_path / "demo.png").exists()
    document = json.loads((tmp_path / "own.json").read_text())
    assert [row["method"] for row in document["rows"]] == ["torchcall"]
    assert abs(document["result"]["drift_mev_per_atom_per_ps"]) < 0.05


def test_double_precision_conserves_energy_better(run, tmp_path, crystal):
    status, _, err = run(
        "--structure", crystal, "--temperature", 30, "--steps", 100, "--dt", 1, "--skin", 0,
        "--float64", "--no-peers", "--json", "run.json",
    )  # fmt: skip
    assert status == 0, err
    result = json.loads((tmp_path / "run.json").read_text())["result"]
    assert abs(result["drift_mev_per_atom_per_ps"]) < 1e-3
    assert result["fluctuation_mev_per_atom"] < 1e-3


def test_the_run_is_repeated_with_more_capacity_after_an_overflow(crystal, capfd):
    cutoff = 5.0
    structure = _system.read_structure(crystal, temperature=30.0, seed=0)
    potential = _potential.load_potential(None, cutoff)
    # An expanded crystal has fewer pairs within the cutoff, so its list overflows.
    expanded = replace(structure, positions=structure.positions * 1.3, cell=structure.cell * 1.3)
    small, _ = _dynamics.start(expanded, cutoff=cutoff, skin=0.0, dtype=np.float32)
    cell = np.asarray(structure.cell, np.float32)[None]
    constants = _dynamics.Constants(
        structure.atomic_numbers,
        np.asarray(structure.masses, np.float32),
        cell,
        structure.pbc[None],
    )
    state = small._replace(positions=np.asarray(structure.positions, np.float32))
    steps = _dynamics.make_run(potential.wrapper, cutoff=cutoff, dt=2.0 * units.fs)
    grown = []
    end, energies, _ = _run.simulate(
        steps, state, constants, 5,
        count=lambda: potential.wrapper.stats()["calls"],
        grown=grown.append,
    )  # fmt: skip
    assert grown[-1].neighbors.edge_index.shape == end.neighbors.edge_index.shape
    assert "repeating the run with more capacity" in capfd.readouterr().out
    assert not end.neighbors.did_overflow
    assert _dynamics.is_finite(energies)
    atoms = ase.Atoms(
        structure.formula, positions=np.asarray(end.positions), cell=structure.cell, pbc=True
    )
    assert int(end.neighbors.n_edges) == len(ase.neighborlist.neighbor_list("i", atoms, cutoff))


def test_a_missing_structure(run):
    status, _, err = run("--structure", "nowhere.xyz")
    assert status == 2
    assert only_line(err) == "torchcall: --structure nowhere.xyz: no such file"


def test_a_structure_that_ase_cannot_read(run, tmp_path):
    (tmp_path / "bad.xyz").write_text("this is\nnot a structure\n")
    status, _, err = run("--structure", "bad.xyz")
    assert status == 2
    assert only_line(err).startswith("torchcall: --structure bad.xyz: ase cannot read the file: ")


def test_a_structure_without_enough_atoms(run, tmp_path):
    ase.io.write(tmp_path / "one.xyz", bulk("Ar", "fcc", a=5.4))
    status, _, err = run("--structure", "one.xyz")
    assert status == 2
    assert only_line(err) == "torchcall: --structure one.xyz: expected at least 2 atoms, got 1"


def test_a_missing_model(run, crystal):
    status, _, err = run("--structure", crystal, "--model", "nowhere.pt")
    assert status == 2
    assert only_line(err) == "torchcall: --model nowhere.pt: no such file"


def test_an_invalid_model_file(run, crystal, tmp_path):
    (tmp_path / "bad.pt").write_bytes(b"not an archive")
    status, _, err = run("--structure", crystal, "--model", "bad.pt")
    assert status == 2
    assert only_line(err).startswith("torchcall: ")
    assert "bad.pt" in err


class NoGradients(torch.nn.Module):
    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"energy": input["charge"]}


def test_a_model_that_returns_no_gradients(run, crystal, tmp_path):
    torch.jit.script(NoGradients()).save(tmp_path / "energy.pt")
    status, _, err = run("--structure", crystal, "--model", "energy.pt", "--no-peers")
    assert status == 2
    expected = "expected a dict with energy and position_gradients, got ['energy']"
    assert only_line(err) == f"torchcall: energy.pt: {expected}"


@pytest.mark.parametrize(
    "argv",
    [
        ("--steps", "0"),
        ("--steps", "many"),
        ("--dt", "-1"),
        ("--cutoff", "nan"),
        ("--temperature", "-5"),
        ("--no-such-option",),
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_a_one_line_error(run, argv):
    status, _, err = run(*argv)
    assert status == 2
    line = only_line(err)
    assert line.startswith("torchcall: ")
    assert argv[0] in line
    assert "demo --help" in line


def test_a_picture_in_a_missing_folder_is_refused_before_the_run(run):
    status, out, err = run("--picture", "nowhere/picture.png")
    assert status == 2
    assert only_line(err).startswith("torchcall: --picture nowhere/picture.png: no such folder")
    assert "NVE" not in out


@pytest.mark.parametrize("package", ["ase", "matplotlib"])
def test_a_missing_package_is_an_error_that_names_the_extra(run, monkeypatch, package):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    status, _, err = run("--picture", "picture.png")
    assert status == 2
    line = only_line(err)
    assert line.startswith("torchcall: ")
    assert f"needs {package}: pip install torchcall[demo]" in line


def test_help_lists_the_options(run):
    status, out, _ = run("--help")
    assert status == 0
    for option in (
        "--structure",
        "--model",
        "--steps",
        "--dt",
        "--temperature",
        "--cutoff",
        "--json",
    ):
        assert option in out


def test_velocities_have_the_exact_temperature_and_no_drift():
    masses = np.linspace(1.0, 40.0, 20)
    velocities = _system.thermal_velocities(masses, units.kB * 300.0, seed=3)
    kinetic = 0.5 * (masses[:, None] * velocities**2).sum()
    assert 2 * kinetic / (57 * units.kB) == pytest.approx(300.0)
    np.testing.assert_allclose((masses[:, None] * velocities).sum(0), 0.0, atol=1e-12)


def test_the_included_files_are_found():
    assert _system.included_file("argon.xyz").is_file()
    with pytest.raises(_system.DemoError, match="the included file nothing was not found in"):
        _system.included_file("nothing")


def test_the_included_potential_is_the_example():
    here = Path(__file__).parents[1] / "examples" / "lennard_jones.py"
    assert _system.included_file("lennard_jones.py").read_text() == here.read_text()


def test_a_diverging_run_is_an_error(run, crystal):
    status, _, err = run("--structure", crystal, "--no-peers", "--steps", 20, "--dt", 1e9)
    assert status == 2
    assert "diverged" in err
    assert "smaller --dt" in err
