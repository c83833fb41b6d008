"""`make test-matrix`, and the table of its results."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def matrix(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "packaging")
    yield __import__("matrix")
    del sys.modules["matrix"]


def test_the_table_is_that_of_the_committed_results(matrix):
    text = matrix.PAGE.read_text()
    assert matrix.filled(text) == text
    assert text.count("\n| 3.") == len(list(matrix.COMMITTED.glob("*.json"))) > 0


def test_a_cell_names_its_versions(matrix):
    cell = matrix.Cell("3.11-torch2.13-jax0.8.1")
    assert (cell.name, cell.python) == ("3.11-torch2.13-jax0.8.1", "3.11")
    assert cell.pins == ["torch==2.13.*", "jax==0.8.1", "jaxlib==0.8.1"]
    assert matrix.Cell("3.12-torch2.13.0-jax0.10.2").pins[0] == "torch==2.13.0"
    with pytest.raises(SystemExit, match="expected a cell like"):
        matrix.Cell("torch2.13")


def test_a_cell_that_cannot_run_says_why(matrix, capsys, tmp_path):
    assert (
        matrix.test(matrix.Cell("3.99-torch2.13-jax0.8.1"), SimpleNamespace(wheels=tmp_path))
        is False
    )
    assert "3.99-torch2.13-jax0.8.1: not run, it needs python3.99" in capsys.readouterr().out
    assert matrix.interpreter(f"3.{sys.version_info.minor}")


def test_an_environment_is_made_once(matrix, monkeypatch, tmp_path):
    commands = []

    def run(*command):
        commands.append(command)
        (tmp_path / "environment").mkdir(exist_ok=True)

    monkeypatch.setattr(matrix, "run", run)
    cell = matrix.Cell("3.11-torch2.13-jax0.8.1")
    python = matrix.environment(cell, "python3.11", tmp_path)
    assert "jax==0.8.1" in next(c for c in commands if "install" in c)
    commands.clear()
    assert matrix.environment(cell, "python3.11", tmp_path) == python
    assert not commands
    matrix.install(cell, "python3.11", "a.whl", tmp_path)  # the wheel may be another one
    assert [c[-1] for c in commands] == ["a.whl"]
    commands.clear()
    matrix.environment(matrix.Cell("3.11-torch2.13-jax0.8.2"), "python3.11", tmp_path)
    assert commands
