"""`python -m torchcall compile`: modules, examples, options, output and exit status."""

import ase.build
import ase.io
import pytest
import reference
import torch
from energies import Soft
from engines import capacity_of

from torchcall.__main__ import main
from torchcall._command._compile_module import load_module, read_example
from torchcall._command.parsing import CommandError

FACTORY = """
import torch

class Soft(torch.nn.Module):
    def forward(self, input):
        pos, (i, j) = input["pos"], input["edge_index"]
        shifts = (input["cell_offsets"].unsqueeze(2) * input["cell"][input["batch"][i]]).sum(1)
        energy = torch.exp(-(pos[j] - pos[i] + shifts).square().sum(1))
        return pos.new_zeros(input["cell"].size(0)).index_add(0, input["batch"][i], energy)

def make():
    return Soft()

def fails():
    raise OSError("no weights")

INSTANCE, NUMBER = Soft(), 3
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A file with modules and a structure, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "soft_model.py").write_text(FACTORY)
    ase.io.write(tmp_path / "si.xyz", ase.build.bulk("Si", cubic=True))
    return tmp_path


def call(*more, module="soft_model.py:make", path="m.pt2", example="si.xyz", cutoff="4"):
    return main(["compile", module, path, "--example", example, "--cutoff", cutoff, *more])


def test_a_factory_and_a_structure_are_compiled_to_a_package(files, uncompiled, capsys):
    assert call("--static") == 0
    (own,) = uncompiled
    assert own["user"]["cutoff"] == 4.0
    assert own["user"]["dtype"] == "float32"
    assert own["axes"]["N"]["capacity"] == 9
    out, err = capsys.readouterr()
    assert out == ""
    stages = ["loading the module", "reading the example", "tracing Soft", "compiling", "wrote"]
    assert [part for part in stages if part in err] == stages
    last = err.splitlines()[-1]
    assert last == "torchcall: next: model = torchcall.mliap.TorchMliap.from_package('m.pt2')"
    assert (files / "m.pt2").exists()


def test_options_reach_the_compiler(files, uncompiled):
    del files
    assert call("--static", "--dtype", "float64", "--no-cache") == 0
    assert call("--static", "--dtype", "float64", "--no-cache") == 0
    assert len(uncompiled) == 2
    assert {own["user"]["dtype"] for own in uncompiled} == {"float64"}
    assert call("--dynamic") == 0
    assert capacity_of(uncompiled[2]) is None


def test_a_pickled_module_needs_permission(files, uncompiled, capsys):
    torch.save(Soft(), files / "m.pt")
    assert call("--static", module="m.pt") == 2
    err = capsys.readouterr().err
    assert "unpickling can run any code" in err
    assert "--allow-pickle" in err
    assert call("--static", "--allow-pickle", module="m.pt") == 0
    assert uncompiled[0]["user"]["dtype"] == "float64"  # that of its weights


FORMS = ["soft_model.py:make", "soft_model.py:INSTANCE", "soft_model.py:Soft"]


@pytest.mark.parametrize("spec", FORMS)
def test_a_factory_may_be_a_function_a_class_or_a_module(spec, files):
    del files
    assert type(load_module(spec, allow_pickle=False)).__name__ == "Soft"


SPECS = [
    ("soft_model.py", "write soft_model.py:NAME"),
    ("missing.py:make", "expected a Python file, got no such file"),
    ("missing.package:make", "expected a module that can be imported, got ModuleNotFoundError"),
    ("soft_model.py:other", "expected a function 'other'"),
    ("soft_model.py:fails", "the factory fails: OSError: no weights"),
    ("broken.py:make", "expected a module that can be imported, got SyntaxError"),
    ("missing.pt", "got neither that nor the name of a file"),
    ("", "got neither that nor the name of a file"),
    ("soft_model.py:", "got neither that nor the name of a file"),
]


@pytest.mark.parametrize("spec, text", SPECS, ids=[spec or "nothing" for spec, _ in SPECS])
def test_a_module_that_cannot_be_loaded_is_an_error(spec, text, files):
    (files / "broken.py").write_text("def (")
    with pytest.raises(CommandError) as caught:
        load_module(spec, allow_pickle=False)
    assert text in str(caught.value)


CALLS = [
    ({"module": "soft_model.py:NUMBER"}, "expected an eager torch.nn.Module, got int"),
    ({"example": "missing.xyz"}, "--example missing.xyz: expected a structure that ASE reads"),
    ({"example": "soft_model.py"}, "expected a structure that ASE reads"),
    ({"example": "far.xyz"}, "expected atoms within 4 Å of each other, got none"),
    ({"cutoff": "-1"}, "--cutoff: expected a number above 0, got '-1'"),
    ({"path": "m.so"}, "expected a name that ends in .pt2, got 'm.so'"),
    ({"path": "."}, "expected the name of a file, got the directory"),
]


@pytest.mark.parametrize("change, text", CALLS, ids=[str(change) for change, _ in CALLS])
def test_a_wrong_argument_is_one_message_and_exit_status_2(change, text, files, capsys):
    ase.io.write(files / "far.xyz", ase.build.molecule("H2").repeat((1, 1, 1)))
    if change.get("example") == "far.xyz":
        ase.io.write(files / "far.xyz", ase.Atoms("H2", [[0, 0, 0], [0, 0, 9]]))
    assert call(**change) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert text in err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("torchcall: ")


@pytest.mark.parametrize("more", [["--static", "--dynamic"], ["--dtype", "half"], ["--nonsense"]])
def test_wrong_options_are_one_line_that_names_the_help(more, files, capsys):
    del files
    assert call(*more) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torchcall: compile: ")
    assert "compile --help" in line


def test_help_tells_of_factories_and_pickles(capsys):
    assert main(["compile", "--help"]) == 0
    out = capsys.readouterr().out
    assert "FILE.py:FACTORY" in out
    assert "--allow-pickle" in out


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_examples_have_ases_edges_in_the_precision_asked_for(dtype, files):
    graph = read_example(files / "si.xyz", 4.0, dtype)
    member = ase.io.read(files / "si.xyz")
    expected = len(ase.neighborlist.neighbor_list("i", member, 4.0))
    assert int(graph.n_edges) == expected
    assert str(graph.positions.dtype) == dtype
    assert graph.list_cutoff == reference.CUTOFF - 0.2
