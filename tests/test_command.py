"""The command line: help and errors before slow imports, exit status."""

import errno
import os
import subprocess
import sys

import pytest

import torchcall
from torchcall.__main__ import COMMANDS, main
from torchcall._command import parsing
from torchcall.md.stop import explain

# Prints what a command imported beside its own output.
LIST_IMPORTS = """
import sys
from torchcall.__main__ import main

status = main(sys.argv[1:])
slow = {"jax", "torch", "ase", "numpy", "matplotlib", "jax_md"} & sys.modules.keys()
print(f"imported: {sorted(slow)}, status {status}")
"""


def only_line(err):
    (line,) = err.splitlines()
    return line


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_the_usage_lists_the_commands(arguments, capsys):
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ")
    assert all(f"  {name} " in printed for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help(name, capsys):
    assert main([name, "--help"]) == 0
    assert "--help" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--help"], ["md", "--help"], ["--version"]], ids=str)
@pytest.mark.parametrize("lost", ["stdout", "both"])
def test_nobody_reads_the_output(arguments, lost):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "torchcall", *arguments],
        stdout=writing, stderr=writing if lost == "both" else subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writing)
    assert done.returncode in (0, 141)  # argparse reports no error
    assert not done.stderr


def test_a_run_whose_output_nobody_reads_ends_quietly(tmp_path):
    with pytest.raises(BrokenPipeError):
        explain(BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, tmp_path / "md.csv")


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == torchcall.__version__


@pytest.mark.parametrize(
    "arguments, status",
    [
        ("--help", 0),
        ("nonsense", 2),
        ("compile --help", 0),
        ("compile m.py:make m.pt2 --example si.xyz --cutoff many", 2),
        ("doctor --nonsense", 2),
        ("energy --structure nowhere.xyz", 2),
        ("relax --smax 1e-3", 2),
        ("relax --fmax 0", 2),
    ],
)
def test_help_and_wrong_options_import_nothing_slow(arguments, status):
    command = [sys.executable, "-c", LIST_IMPORTS, *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == f"imported: [], status {status}"
    assert len(done.stderr.splitlines()) == (status != 0)


def test_names_of_the_package_are_imported_when_they_are_used():
    code = "import sys, torchcall; assert 'jax' not in sys.modules; torchcall.load; import jax"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert set(torchcall.__all__) <= set(dir(torchcall))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = torchcall.nonsense


def test_an_unknown_command_is_one_line(capsys):
    assert main(["dcotor"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert only_line(err).startswith("torchcall: expected a command (")
    assert "got 'dcotor'" in err


def test_the_module_is_a_program():
    command = [sys.executable, "-m", "torchcall", "nonsense"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert only_line(done.stderr).startswith("torchcall: ")


def test_a_missing_package_is_one_line(monkeypatch, capsys):
    error = ModuleNotFoundError("No module named 'filelock'", name="filelock")
    monkeypatch.setattr("torchcall._command.energy.run", lambda _: (_ for _ in ()).throw(error))
    assert main(["energy"]) == 1
    assert only_line(capsys.readouterr().err).endswith("pip install filelock")


@pytest.mark.parametrize(
    "kind, text, wanted",
    [
        (parsing.number(above=0), "0", "a number above 0"),
        (parsing.number(above=0), "nan", "a number above 0"),
        (parsing.number(least=0), "-1e-9", "a number, at least 0"),
        (parsing.number(least=1, kind=int), "1.5", "a whole number, at least 1"),
        (parsing.existing_file, "nowhere.xyz", "expected a file, no such file"),
        (parsing.existing_file, ".", "expected a file, got a folder"),
        (parsing.output_file(".png", ".svg"), "a.txt", "a name ending in .png or .svg"),
        (parsing.output_file(), "nowhere/a.txt", "no such folder"),
    ],
)
def test_types_of_options_say_what_they_expect(kind, text, wanted):
    with pytest.raises(parsing.argparse.ArgumentTypeError) as caught:
        kind(text)
    assert wanted in str(caught.value)
    assert text in str(caught.value)
