"""`torchcall energy` and `torchcall relax` against ASE's Lennard-Jones calculator."""

import json
import re
from pathlib import Path

import ase.io
import numpy as np
import pair_potential
import pytest
import torch
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms, FixBondLength
from pair_potential import CUTOFF, EPSILON, ONSET, SIGMA

from torchcall.__main__ import main
from torchcall._command import relax


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory: a crystal, a molecule and a potential."""
    monkeypatch.chdir(tmp_path)
    crystal = bulk("Ar", "fcc", a=5.55, cubic=True)
    crystal.rattle(0.15, seed=4)
    crystal.write("crystal.xyz")
    ase.Atoms("Ar3", [[0, 0, 0], [4, 0, 0], [2, 3.3, 0]]).write("molecule.xyz")
    torch.jit.script(pair_potential.LennardJones().eval()).save("lj.pt")
    return tmp_path


def command(*arguments):
    return main([*arguments, "--model", "lj.pt", "--threads", "1"])


def with_reference(file):
    atoms = ase.io.read(file)
    atoms.calc = LennardJones(sigma=SIGMA, epsilon=EPSILON, rc=CUTOFF, ro=ONSET, smooth=True)
    return atoms


def only_line(text):
    (line,) = text.splitlines()
    return line


def test_energy_as_a_table_and_as_json(capsys):
    assert command("energy", "--structure", "crystal.xyz", "--json", "e.json") == 0
    printed = capsys.readouterr().out
    found = json.loads(Path("e.json").read_text())
    atoms = with_reference("crystal.xyz")
    energy = atoms.get_potential_energy()
    assert found["n_atoms"] == 4
    assert found["energy"] == pytest.approx(energy, abs=1e-7)  # the file rounds positions
    assert found["energy_per_atom"] == found["energy"] / 4
    np.testing.assert_allclose(found["forces"], atoms.get_forces(), rtol=0, atol=1e-7)
    largest = np.linalg.norm(atoms.get_forces(), axis=1).max()
    assert found["max_force"] == pytest.approx(largest, abs=1e-7)
    assert list(found["stress"]) == ["xx", "yy", "zz", "yz", "xz", "xy"]
    stress = atoms.get_stress()
    np.testing.assert_allclose(list(found["stress"].values()), stress, rtol=0, atol=1e-9)
    assert found["pressure"] == pytest.approx(-stress[:3].mean(), abs=1e-9)
    assert f"{energy:.6f} eV" in printed
    assert f"pressure         {found['pressure']:.6f} eV/Å³ = " in printed
    assert len(re.findall(r"^\d  +Ar", printed, re.MULTILINE)) == 4


def test_energy_of_a_molecule_on_standard_output(capsys):
    assert command("energy", "--structure", "molecule.xyz", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["energy"] == pytest.approx(with_reference("molecule.xyz").get_potential_energy())
    assert found["stress"] is None
    assert found["pressure"] is None
    assert command("energy", "--structure", "molecule.xyz") == 0
    assert "not defined without a cell of three vectors" in capsys.readouterr().out


def test_overlapping_atoms_are_one_line(capsys):
    ase.Atoms("ArNe", [[0, 0, 0], [0, 0, 0]]).write("overlap.xyz")
    assert command("energy", "--structure", "overlap.xyz") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "expected a finite energy and finite forces, got energy nan eV" in err.splitlines()[-1]
    assert "on atom 0 (Ar); do atoms overlap?" in err.splitlines()[-1]


def test_relaxed_atoms_are_at_ases_minimum(capsys):
    arguments = ("--structure", "molecule.xyz", "--fmax", "0.001", "--out", "out.xyz")
    assert command("relax", *arguments) == 0
    assert "converged after" in capsys.readouterr().err.splitlines()[-1]
    relaxed = with_reference("out.xyz")
    assert np.linalg.norm(relaxed.get_forces(), axis=1).max() <= 0.001 + 1e-6
    assert relaxed.get_potential_energy() < with_reference("molecule.xyz").get_potential_energy()
    assert not [name for name in relaxed.cell.array.ravel() if name]


def test_a_relaxed_cell_has_small_forces_and_stress(folder):
    arguments = ("--cell", "--fmax", "0.002", "--smax", "2e-5", "--out", "out.extxyz")
    assert command("relax", "--structure", "crystal.xyz", *arguments) == 0
    relaxed = with_reference("out.extxyz")
    assert np.linalg.norm(relaxed.get_forces(), axis=1).max() <= 0.002 + 1e-6
    assert np.abs(relaxed.get_stress()).max() <= 2e-5 + 1e-7
    assert np.abs(with_reference("crystal.xyz").get_stress()).max() > 4e-4
    assert not list(folder.glob(".part*"))


def test_fixed_atoms_move_with_the_cell_only(capsys):
    before = ase.io.read("crystal.xyz")
    before.set_constraint(FixAtoms([0, 1]))
    before.write("fixed.traj")
    assert command("relax", "--structure", "fixed.traj", "--cell", "--out", "out.traj") == 0
    assert "fixed atoms keep their fractional coordinates" in capsys.readouterr().err
    after = with_reference("out.traj")
    assert abs(after.get_volume() / before.get_volume() - 1) > 0.005
    fractions = before.get_scaled_positions(), after.get_scaled_positions()
    np.testing.assert_allclose(fractions[0][:2], fractions[1][:2], rtol=0, atol=1e-9)
    forces = np.linalg.norm(after.get_forces(apply_constraint=False), axis=1)
    assert forces[2:].max() < 0.011 < forces[:2].min()
    assert np.abs(after.get_stress(apply_constraint=False)).max() < 1.1e-4


def test_constraints_that_a_changing_cell_breaks_are_refused(capsys):
    bonded = ase.io.read("crystal.xyz")
    bonded.set_constraint(FixBondLength(0, 1))
    bonded.write("bonded.traj")
    assert command("relax", "--structure", "bonded.traj", "--cell") == 2
    assert "got FixBondLengths; relax without --cell" in only_line(capsys.readouterr().err)


def test_too_few_steps_write_the_last_structure(capsys):
    arguments = ("--structure", "crystal.xyz", "--steps", "2", "--out", "out.extxyz")
    assert command("relax", *arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"torchcall: relax: not converged after 2 steps: largest force \S+ eV/Å, expected at most "
        r"0\.01 eV/Å; wrote the last structure to out\.extxyz",
        last,
    )
    moved = with_reference("out.extxyz").positions - with_reference("crystal.xyz").positions
    assert 0 < np.abs(moved).max() < 0.5


def test_an_interrupted_relaxation_writes_the_last_structure(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(relax, "_largest", interrupt)
    assert command("relax", "--structure", "crystal.xyz", "--out", "out.extxyz") == 130
    assert "interrupted at step 0; wrote the last" in capsys.readouterr().err.splitlines()[-1]
    assert len(ase.io.read("out.extxyz")) == 4


@pytest.mark.parametrize(
    "options, expected",
    [
        ("--smax 1e-3", "--smax: expected --cell beside it"),
        ("--out out.nonsense", "--out out.nonsense: expected a name with a format that ASE"),
        ("--cell", "--cell: expected three periodic axes, got pbc [False, False, False]"),
        ("--out POSCAR", "--out POSCAR: cannot be written: "),
        ("--structure lj.pt", "--structure lj.pt: expected a structure that ASE reads"),
    ],
)
def test_wrong_options_are_one_line_before_the_model_is_loaded(
    options, expected, monkeypatch, capsys, folder
):
    monkeypatch.setattr(relax, "calculator", None)
    before = sorted(folder.iterdir())
    assert command("relax", "--structure", "molecule.xyz", *options.split()) in (1, 2)
    assert expected in only_line(capsys.readouterr().err)
    assert sorted(folder.iterdir()) == before
