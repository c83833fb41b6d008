"""`make test-matrix`, and the table of its results."""

import sys
from itertools import chain
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


def test_a_cell_that_was_cut_short_goes_on_with_the_next_folder(matrix, monkeypatch, tmp_path):
    ran, stop_at = [], "tests/transforms/test_b.py"
    report = '<testsuite time="1"><testcase classname="c" name="n">{}</testcase></testsuite>'

    def run(command, **_):
        files = [word for word in command if word.startswith("tests/")]
        if stop_at in files:
            raise KeyboardInterrupt
        ran.append(files)
        (path,) = [word.partition("=")[2] for word in map(str, command) if "junitxml" in word]
        Path(path).write_text(report.format("<failure/>" if "tests/test_x.py" in files else ""))
        return SimpleNamespace(returncode=int("tests/test_x.py" in files))

    root = tmp_path / "root"
    files = ["tests/md/test_a.py", "tests/test_a.py", "tests/test_x.py", stop_at]
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    monkeypatch.setattr(matrix, "ROOT", root)
    monkeypatch.setattr(matrix, "versions", lambda *_: {"python": "3.11.7"})
    monkeypatch.setattr(matrix.subprocess, "run", run)
    options = SimpleNamespace(tests=[], jobs=1)
    arguments = "python", tmp_path / "cell", tmp_path / "reports", options
    with pytest.raises(KeyboardInterrupt):
        matrix.run_tests(*arguments)
    first, stop_at = list(ran), ""
    assert sorted(chain(*first)) == files[:3]
    found = matrix.run_tests(*arguments)
    assert ran[len(first) :] == [["tests/transforms/test_b.py"]]
    assert (found["passed"], found["failed"], found["seconds"]) == (3, 1, 4)
    assert found["failures"] == ["c::n"]


def test_the_parts_of_a_cell_are_all_files_of_tests(matrix):
    found = chain(*matrix.parts(ROOT, []).values())
    assert sorted(ROOT / file for file in found) == sorted((ROOT / "tests").rglob("test_*.py"))
    assert matrix.parts(ROOT, ["tests/md"]) == {"selection": ["tests/md"]}
