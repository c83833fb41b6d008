"""`torchcall md`: trajectories against ASE, conserved quantities, replicas, explosions, output."""

import io
import json

import ase.io
import ase.neighborlist
import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from ase.io.extxyz import write_extxyz
from ase.md.verlet import VelocityVerlet

from torchcall.__main__ import main
from torchcall._command.included import argon, load_example
from torchcall.md import ensembles
from torchcall.md.ensembles import Settings, keys
from torchcall.md.files import extxyz
from torchcall.md.report import read_log
from torchcall.md.rows import fixed
from torchcall.md.simulation import Frame, Simulation
from torchcall.md.system import System, initial_momenta

CUTOFF = 5.0


def crystal():
    atoms = bulk("Ar", "fcc", a=5.4, cubic=True).repeat(2)
    atoms.rattle(0.05, rng=np.random.default_rng(1))
    return atoms


@pytest.fixture
def md(tmp_path, monkeypatch):
    """Runs `torchcall md` on 32 argon atoms in an empty folder; returns its exit status."""
    monkeypatch.chdir(tmp_path)
    ase.io.write("crystal.extxyz", crystal())

    def call(*options):
        common = "--structure crystal.extxyz --cutoff 5 --temperature 30 --threads 1 --skin 0.6"
        return main(["md", *common.split(), *options])

    return call


class EagerArgon(Calculator):
    """The potential in eager torch on ASE's neighbour list."""

    implemented_properties = ("energy", "forces")

    def __init__(self):
        super().__init__()
        self.module = load_example("lennard_jones").LennardJones(cutoff=CUTOFF)

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        i, j, shifts = ase.neighborlist.neighbor_list("ijS", atoms, CUTOFF)
        out = self.module(
            {
                "pos": torch.tensor(atoms.positions),
                "cell": torch.tensor(atoms.cell[:])[None],
                "edge_index": torch.tensor(np.stack([i, j])),
                "cell_offsets": torch.tensor(shifts, dtype=torch.float64),
                "batch": torch.zeros(len(atoms), dtype=torch.int64),
            }
        )
        self.results["energy"] = float(out["energy"][0])
        self.results["forces"] = -out["position_gradients"].numpy()


def test_nve_is_ases_trajectory(md, tmp_path):
    options = ("--steps", "100", "--every", "10", "--dtype", "float64", "--traj", "t.extxyz")
    assert md(*options, "--json", "run.json") == 0
    frames = ase.io.read(tmp_path / "t.extxyz", ":")
    assert [atoms.info["step"] for atoms in frames] == list(range(0, 101, 10))
    atoms = frames[0].copy()
    atoms.calc = EagerArgon()
    VelocityVerlet(atoms, 2 * units.fs).run(100)
    # Trajectories have eight decimals.
    np.testing.assert_allclose(frames[-1].positions, atoms.positions, atol=3e-7)
    np.testing.assert_allclose(frames[-1].get_momenta(), atoms.get_momenta(), atol=3e-6)
    np.testing.assert_allclose(frames[-1].get_forces(), atoms.get_forces(), atol=1e-6)
    rows = read_log(tmp_path / "md.csv")
    assert rows["potential_ev"][-1, 0] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    assert rows["kinetic_ev"][-1, 0] == pytest.approx(atoms.get_kinetic_energy(), abs=1e-6)
    kelvin = 2 * atoms.get_kinetic_energy() / (93 * units.kB)
    assert rows["temperature_k"][-1, 0] == pytest.approx(kelvin, abs=1e-3)
    assert rows["temperature_k"][0, 0] == pytest.approx(30.0, abs=1e-3)
    result = json.loads((tmp_path / "run.json").read_text())["result"]
    assert abs(result["drift"]) < 1e-3
    assert (tmp_path / "md.png").read_bytes().startswith(b"\x89PNG")


def simulation(ensemble, thermostat="nose-hoover", *, every=50, temperature=40.0, timestep=2.0):
    system = System.from_ase(crystal())
    settings = Settings(
        ensemble,
        thermostat,
        timestep * units.fs,
        temperature * units.kB,
        0.01 * units.GPa,
        0.05 / units.fs,
    )
    model = argon(CUTOFF, threads=1)
    return model, Simulation(
        model, system, settings, every=every, skin=0.6, dtype=np.float32, kb=units.kB
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_jax_mds_own_shift_does_not_conserve_energy_at_constant_pressure(monkeypatch):
    def change():
        _, run = simulation("npt")
        with jax_promotion():
            momenta = initial_momenta(run.system, 1, thermal_energy=40 * units.kB, seed=0)
            group = run.start(momenta, keys(0, 1))
            first = run.frame(group)
            for _ in range(10):
                group = run.advance(group)
            last = run.frame(group)
        assert last.volume / first.volume > 1.05
        return abs(float(last.conserved[0] - first.conserved[0]))

    corrected = change()
    monkeypatch.setattr(ensembles, "with_box", lambda *_: 0.0)
    assert change() > 50 * corrected


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
@pytest.mark.parametrize("ensemble", [pytest.param("nvt", marks=pytest.mark.slow), "npt"])
def test_thermostat_and_barostat_conserve_their_energy_with_one_call_a_step(ensemble):
    model, run = simulation(ensemble)
    with jax_promotion():
        momenta = initial_momenta(run.system, 2, thermal_energy=40 * units.kB, seed=0)
        group = run.start(momenta, keys(0, 2))
        first = run.frame(group)
        group = run.advance(group)
        calls = model.wrapper.stats()["calls"]
        for _ in range(9):
            group = run.advance(group)
        assert model.wrapper.stats()["calls"] - calls == 9 * 50
        last = run.frame(group)
    np.testing.assert_allclose(last.conserved, first.conserved, atol=1e-4)
    # What is conserved is not the energy of the atoms.
    energies = [frame.potential + frame.kinetic for frame in (first, last)]
    assert (np.abs(energies[1] - energies[0]) > 1e-2).all()
    if ensemble == "npt":
        assert (np.abs(last.volume / first.volume - 1) > 0.02).all()


def jax_promotion():
    import jax

    return jax.numpy_dtype_promotion("standard")


def test_pressure_is_the_derivative_of_the_energy_by_the_volume():
    _, run = simulation("nve")
    momenta = initial_momenta(run.system, 1, thermal_energy=40 * units.kB, seed=0)
    with jax_promotion():
        frame = run.frame(run.start(momenta, keys(0, 1)))
    calculator, strain = EagerArgon(), 1e-4
    energies = []
    for sign in (-1, 1):
        atoms = crystal()
        atoms.set_cell(atoms.cell * (1 + sign * strain), scale_atoms=True)
        atoms.calc = calculator
        energies.append((atoms.get_volume(), atoms.get_potential_energy()))
    (small, low), (large, high) = energies
    ideal = 2 * float(frame.kinetic[0]) / (3 * crystal().get_volume())
    expected = ideal - (high - low) / (large - small)
    assert float(frame.pressure[0]) == pytest.approx(expected, rel=1e-3)


def test_langevin_reaches_its_temperature():
    _, run = simulation("nvt", "langevin", every=400, temperature=60.0)
    momenta = initial_momenta(run.system, 8, thermal_energy=1e-6, seed=0)
    with jax_promotion():
        group = run.start(momenta, keys(0, 8))
        assert run.frame(group).temperature.max() < 0.1
        temperatures = []
        for _ in range(4):
            group = run.advance(group)
            temperatures.append(run.frame(group).temperature)
    # 32 values with a standard deviation of 60 √(2/96) = 8.7 K.
    assert np.mean(temperatures) == pytest.approx(60.0, abs=5.0)


def test_replicas_are_the_runs_of_their_own(md, tmp_path):
    assert md("--steps", "40", "--replicas", "3", "--log", "all.csv", "--traj", "t.extxyz") == 0
    rows = read_log(tmp_path / "all.csv")
    assert rows["replica"][0].tolist() == [0, 1, 2]
    assert len(set(rows["potential_ev"][-1])) == 3
    ase.io.write("crystal.extxyz", ase.io.read("t-2.extxyz", "0"))
    options = "--structure crystal.extxyz --cutoff 5 --threads 1 --skin 0.6 --steps 40"
    assert main(["md", *options.split(), "--log", "one.csv"]) == 0
    one = read_log(tmp_path / "one.csv")
    np.testing.assert_allclose(one["total_ev"][:, 0], rows["total_ev"][:, 2], atol=2e-6)
    np.testing.assert_allclose(one["potential_ev"][:, 0], rows["potential_ev"][:, 2], atol=1e-5)


def test_an_explosion_names_step_atom_force_and_the_last_good_frame(md, tmp_path, capfd):
    atoms = crystal()
    atoms.positions[5] = atoms.positions[9] + [0.9, 0.0, 0.0]  # far too near
    ase.io.write("crystal.extxyz", atoms)
    assert md("--steps", "40", "--traj", "t.extxyz", "--timestep", "1") == 1
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("torchcall: md: the simulation exploded in step 1: atom ")
    assert "eV/Å" in line
    assert "smaller --timestep" in line
    assert any(f"atom {atom} (Ar)" in line for atom in (5, 9))
    good = ase.io.read(tmp_path / "md.last-good.extxyz")
    np.testing.assert_allclose(good.positions, atoms.positions, atol=1e-5)
    assert len(ase.io.read(tmp_path / "t.extxyz", ":")) == 1


def test_the_number_of_threads_is_measured_once_and_kept(md, tmp_path):
    options = "--structure crystal.extxyz --cutoff 5 --skin 0.6 --seed 0 --temperature 30"
    assert main(["md", *options.split(), "--steps", "10"]) == 0
    assert main(["md", "--restart", "--steps", "20"]) == 0
    assert md("--steps", "20", "--log", "one.csv") == 0
    ours, one = (read_log(tmp_path / name)["total_ev"] for name in ("md.csv", "one.csv"))
    np.testing.assert_allclose(ours, one, atol=1e-5)


ERRORS = [
    ("--steps 15", "--steps: expected a multiple of --every 10, got 15"),
    ("--timestep 0", "--timestep: expected a number above 0"),
    ("--temperature -1", "--temperature: expected a number, at least 0"),
    ("--structure nowhere.cif", "--structure: nowhere.cif: expected a file, no such file"),
    ("--model nowhere.pt", "--model: nowhere.pt: no such file"),
    ("--traj out.dcd", "--traj: out.dcd: expected a name ending in .extxyz or .xyz or .h5"),
    ("--log nowhere/md.csv", "--log: nowhere/md.csv: no such folder"),
    ("--ensemble npt --thermostat langevin", "--thermostat langevin: expected nose-hoover for npt"),
    ("--devices 2", "--devices: expected at most the number of replicas, 1, got 2"),
    ("--restart --overwrite", "not allowed with argument"),
    ("--restart", "md.checkpoint.npz: no such file; --log names the run to continue"),
    ("--thermostat langevin", "--thermostat: expected --ensemble nvt or npt beside it, got nve"),
    ("--pressure 0", "--pressure: expected --ensemble npt beside it, got nve"),
    ("--ensemble nvt --friction 1", "--friction: expected --thermostat langevin beside it"),
    ("--ensemble nvt --temperature 0", "--temperature: expected a number above 0 for a thermostat"),
    ("--seed 4294967296", "--seed: expected a whole number, at least 0, at most 4294967295"),
    ("--json md.csv", "--json: expected another file than --log, got md.csv"),
    ("--plot sub/../md.png --json md.png", "--json: expected another file than --plot"),
]


@pytest.mark.parametrize("options, text", ERRORS, ids=[options for options, _ in ERRORS])
def test_a_wrong_option_is_one_line(options, text, md, tmp_path, capfd):
    del md  # its folder
    (tmp_path / "sub").mkdir()
    words = options.split()
    assert main(["md", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("torchcall: md: ")
    assert text in line


def test_unusable_structures_and_models_are_one_line(md, tmp_path, capfd):
    (tmp_path / "bad.xyz").write_text("this is\nnot a structure\n")
    ase.io.write("slab.extxyz", ase.Atoms("Ar2", [[0, 0, 0], [3.5, 0, 0]]))
    (tmp_path / "bad.pt").write_bytes(b"not an archive")
    ase.Atoms("Ar2", np.zeros((2, 3)), cell=[12] * 3, pbc=True).write("same.xyz")
    fixed = crystal()
    fixed.set_constraint(FixAtoms([0]))
    fixed.write("fixed.traj")
    for options, text in [
        ("--structure bad.xyz", "--structure bad.xyz: expected a structure that ASE reads, got"),
        ("--structure slab.extxyz --ensemble npt", "periodic along all three axes"),
        ("--model bad.pt", "bad.pt: "),
        ("--model no-such-network", "no-such-network"),
        (
            "--structure same.xyz",
            "expected finite energies and forces, got NaN or infinity; do atoms",
        ),
        ("--structure fixed.traj", "expected no constraints, which md would ignore, got FixAtoms"),
    ]:
        assert md(*options.split()) == 2
        line = capfd.readouterr().err.splitlines()[-1]
        assert line.startswith("torchcall: ")
        assert text in line


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-7, 1e3, 1e6])
def test_frames_are_those_that_ase_writes(dtype, size):
    atoms, generator = bulk("OCa", "rocksalt", a=5.64), np.random.default_rng(0)
    atoms.pbc = [True, False, True]
    arrays = {
        name: (generator.normal(size=(2, 2, 3)) * size).astype(dtype)
        for name in ("positions", "momenta", "forces")
    }
    nothing = dict.fromkeys(
        ("kinetic", "conserved", "temperature", "pressure", "volume"), np.zeros(2)
    )
    frame = Frame(
        **arrays, **nothing, cell=np.stack([atoms.cell[:], 2 * atoms.cell[:]]), potential=np.ones(2)
    )
    atoms.set_cell(2 * atoms.cell)
    atoms.positions = arrays["positions"][1]
    atoms.set_momenta(arrays["momenta"][1])
    atoms.info = {"step": 3, "time_ps": 0.25}
    atoms.calc = SinglePointCalculator(atoms, energy=1.0, forces=arrays["forces"][1])
    text = io.StringIO()
    write_extxyz(text, [atoms], columns=["symbols", "positions", "momenta", "forces"])
    system = System.from_ase(atoms)
    assert extxyz(system, frame, 1, step=3, time_ps=0.25).decode() == text.getvalue()


def test_numbers_of_frames_are_formatted_like_pythons():
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint64)
    drawn = bits.astype(np.uint32).view(np.float32)
    drawn = drawn[np.abs(drawn) < 1e6]
    ties = np.arange(-999, 1000, 2, np.float32) / 2**9  # halves of the last digit
    borders = [sign * 10.0**k for k in range(-9, 6) for sign in (1, -1)]
    special = [0.0, -0.0, 999999.9375, -999999.9375]
    values = np.concatenate([drawn, ties, np.asarray([*borders, *special], np.float32)])
    expected = "%16.8f" * values.size % tuple(values.tolist())
    assert fixed(values).tobytes().decode() == expected


@pytest.mark.parametrize(
    "formula, ensemble", [("Ar", "nve"), pytest.param("Ar2", "nvt", marks=pytest.mark.slow)]
)
def test_molecules_without_a_cell(formula, ensemble, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ase.Atoms(formula, [[0, 0, 4.0 * k] for k in range(len(ase.Atoms(formula)))]).write("a.xyz")
    options = f"--structure a.xyz --ensemble {ensemble} --temperature 30 --threads 1"
    assert main(["md", *options.split(), "--steps", "20", "--traj", "t.extxyz"]) == 0
    rows, frames = read_log(tmp_path / "md.csv"), ase.io.read("t.extxyz", ":")
    np.testing.assert_allclose(rows["conserved_ev"], rows["conserved_ev"][0, 0], atol=1e-6)
    assert np.isnan(rows["pressure_gpa"]).all()
    assert not any(frame.pbc.any() for frame in frames)
    if len(frames[0]) == 1:
        velocity = frames[0].get_velocities() * 20 * 2 * units.fs
        if ensemble == "nve":
            np.testing.assert_allclose(
                frames[-1].positions - frames[0].positions, velocity, rtol=1e-4
            )


def test_hdf5(md, tmp_path):
    h5py = pytest.importorskip("h5py")
    assert md("--steps", "20", "--replicas", "2", "--traj", "t.h5") == 0
    assert md("--restart", "--steps", "40") == 0
    with h5py.File(tmp_path / "t.h5") as file:
        assert file["positions"].shape == (5, 2, 32, 3)
        assert file["step"][:].tolist() == [0, 10, 20, 30, 40]
        rows = read_log(tmp_path / "md.csv")
        np.testing.assert_allclose(file["potential"], rows["potential_ev"], rtol=1e-6)
