"""The demo: `torchcall md` with its defaults, and the comparison with JAX's callbacks."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import units

from torchcall.__main__ import main
from torchcall._command.included import included_file
from torchcall._command.parsing import CommandError
from torchcall.demo import _compare


def test_the_default_structure_is_liquid_argon_with_velocities():
    argon = ase.io.read(included_file("argon.xyz"))
    assert argon.get_chemical_formula() == "Ar500"
    assert argon.pbc.all()
    assert 500 / argon.get_volume() == pytest.approx(0.0207, rel=0.01)
    assert 2 * argon.get_kinetic_energy() / (1497 * units.kB) == pytest.approx(94.4, abs=5.0)
    np.testing.assert_allclose(argon.get_momenta().sum(0), 0.0, atol=1e-2)


def test_the_demo_conserves_energy_and_times_the_callbacks(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_compare, "ROUNDS", 1)
    assert main(["demo", "--steps", "200", "--json", "demo.json"]) == 0
    document = json.loads((tmp_path / "demo.json").read_text())
    assert abs(document["result"]["drift"]) < 0.005
    assert document["result"]["fluctuation"] < 0.005
    assert document["result"]["temperature"] == pytest.approx(95.0, abs=8.0)
    methods = [row["method"] for row in document["rows"]]
    assert methods == ["torchcall", "buffer_callback", "pure_callback"]
    assert all(row["us_median"] > 0 for row in document["rows"])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]
    out, err = capfd.readouterr()
    assert "200/200" in err
    assert "pure_callback" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("Ar500, Lennard-Jones argon, NVE, 2 fs: 0.4 ps. Wrote demo.png, demo.j")
    assert "Try next: " in last


def test_the_included_files_are_found():
    here = Path(__file__).parents[1] / "examples" / "lennard_jones.py"
    assert included_file("lennard_jones.py").read_text() == here.read_text()
    with pytest.raises(CommandError, match="the included file nothing was not found in"):
        included_file("nothing")
