"""The steps of a compilation: shapes tried, progress, files written, state restored.

torch's compiler is replaced by a function that runs the exported program. `test_compiled.py` tests
compiled packages.
"""

import ast
import os
import re
import threading
import warnings

import numpy as np
import pytest
import reference
import torch
from energies import Soft, odd
from engines import capacity_of

import torchcall
from torchcall._compile._run import _expected_time
from torchcall.mliap import AtomGraph, pad_graph

CUTOFF = reference.CUTOFF


def compiled(module, path, example, **options):
    return torchcall.mliap.compile(module, path, example=example, cutoff=CUTOFF, **options)


def atom_graph(dtype=np.float64):
    arrays = {
        key: value.numpy()
        for key, value in reference.graph([reference.systems()["triclinic"]], phantom=False).items()
    }
    return AtomGraph(
        positions=arrays["pos"].astype(dtype),
        atomic_numbers=arrays["atomic_numbers"],
        cell=arrays["cell"].astype(dtype),
        pbc=arrays["pbc"],
        batch=None,
        edge_index=arrays["edge_index"],
        cell_offsets=arrays["cell_offsets"],
    )


def test_any_shapes_are_tried_first(uncompiled, tmp_path, example):
    path = compiled(Soft(), tmp_path / "m.pt2", example)
    assert path == tmp_path / "m.pt2"
    assert os.listdir(tmp_path / "cache")
    (own,) = uncompiled
    assert ast.literal_eval(path.read_text()) == own
    assert capacity_of(own) is None
    assert own["user"]["dtype"] == "float64"
    assert own["user"]["cutoff"] == CUTOFF
    assert own["name"] == "Soft"
    assert [row["name"] for row in own["inputs"]] == list(example)
    assert [row["name"] for row in own["outputs"]] == [
        "energy",
        "position_gradients",
        "cell_gradients",
    ]


def test_a_module_that_fixes_a_size_gets_a_capacity(
    uncompiled, tmp_path, example, capsys, monkeypatch
):
    module = odd(lambda i, e: e * (2.0 if i["pos"].size(0) > 500 else 1.0), "Branching")
    monkeypatch.setenv("TORCHCALL_PROGRESS", "1")
    compiled(module, tmp_path / "m.pt2", example)
    (own,) = uncompiled
    assert capacity_of(own) == {"N": 9, "E": example["cell_offsets"].shape[0], "B": 2}
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.index("any shapes first") < printed.err.index("tracing Branching")
    assert "cannot compile for any shapes: the module branches on N <= 500" in printed.err
    assert "compiling for a capacity of 9 atoms" in printed.err
    with pytest.raises(torchcall.CompileError, match="dynamic=False compiles it for"):
        compiled(module, tmp_path / "n.pt2", example, dynamic=True)
    assert not (tmp_path / "n.pt2").exists()


def test_a_module_that_branches_on_one_size_gets_a_capacity(uncompiled, tmp_path, example):
    module = odd(lambda i, e: 2.0 * e if i["pos"].size(0) == 31 else e, "OneSize")
    compiled(module, tmp_path / "m.pt2", example)
    assert capacity_of(uncompiled[0]) is not None


def test_static_packages_have_the_padded_examples_sizes(uncompiled, tmp_path):
    graph = atom_graph()
    compiled(Soft(), tmp_path / "m.pt2", graph, dynamic=False)
    slots = graph.edge_index.shape[1]
    assert capacity_of(uncompiled[0]) == {"N": 9, "E": slots, "B": 2}
    larger, _ = pad_graph(atom_graph(np.float32), cutoff=CUTOFF, n_atoms=12, n_edges=200)
    compiled(Soft(), tmp_path / "m.pt2", larger, dynamic=False, dtype="float64")
    assert capacity_of(uncompiled[1]) == {"N": 12, "E": 200, "B": 2}


@pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["single", "double"])
def test_a_package_takes_its_precision_from_the_example(dtype, uncompiled, tmp_path):
    own = torch.float32 if dtype == np.float32 else torch.float64
    compiled(Soft(own), tmp_path / "m.pt2", atom_graph(dtype), dynamic=False)
    assert uncompiled[0]["user"]["dtype"] == np.dtype(dtype).name


@pytest.mark.parametrize("dtype", [torch.float32, np.float32, "float32", np.dtype("f4")], ids=str)
def test_a_dtype_may_be_given_in_any_form(dtype, uncompiled, tmp_path, example):
    compiled(Soft(), tmp_path / "m.pt2", example, dtype=dtype, dynamic=False)
    assert uncompiled[0]["user"]["dtype"] == "float32"


@pytest.mark.parametrize(
    "name, value, species",
    [
        ("species", [14, 6, 14], [6, 14]),
        ("atomic_numbers", torch.tensor([8, 1]), [1, 8]),
        ("species", "Si", None),
    ],
    ids=["a list", "a buffer", "something else"],
)
def test_species_are_read_from_the_module(name, value, species, uncompiled, tmp_path, example):
    module = Soft()
    setattr(module, name, value)
    compiled(module, tmp_path / "m.pt2", example, dynamic=False)
    assert uncompiled[0]["user"]["species"] == species


def test_modules_that_differentiate_may_lack_cell_gradients(uncompiled, tmp_path, example):
    module = reference.example("stillinger_weber").StillingerWeber()
    compiled(module, tmp_path / "m.pt2", example, dynamic=False)
    (own,) = uncompiled
    assert own["user"]["compute_cell_gradients"] is False
    assert [row["name"] for row in own["outputs"]] == ["energy", "position_gradients"]


def test_the_state_of_the_process_does_not_change(uncompiled, tmp_path, example):
    del uncompiled

    def state():
        return {
            "default dtype": torch.get_default_dtype(),
            "gradients": torch.is_grad_enabled(),
            "random": torch.random.get_rng_state().tolist(),
            "numpy": np.random.get_state()[1].tolist(),
            "environment": dict(os.environ),
            "script calls": torch.jit.ScriptFunction.__call__,
            "warnings": list(warnings.filters),
            "compiler": torch._inductor.config.get_config_copy(),
            "threads": torch.get_num_threads(),
        }

    import torch._inductor.config

    before = state()
    with torch.no_grad():
        compiled(Soft(), tmp_path / "m.pt2", example)
    assert state() == before
    with pytest.raises(torchcall.CompileError):
        compiled(odd(lambda _, e: e * float(e.sum())), tmp_path / "m.pt2", example)
    assert state() == before


def test_it_works_under_no_grad_inference_mode_and_autocast(uncompiled, tmp_path, example):
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False, cache=False)
    assert len({own["content"] for own in uncompiled}) == 1


def test_nothing_is_printed_unless_asked_for(uncompiled, tmp_path, example, capfd, monkeypatch):
    del uncompiled
    compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("TORCHCALL_PROGRESS", "1")
    compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False, cache=False)
    out, err = capfd.readouterr()
    assert out == ""
    stages = ["running the module", "tracing Soft", "compiling", "checking"]
    assert [part for part in stages if part in err] == stages
    assert all(line.startswith("torchcall: compile: ") for line in err.splitlines())
    assert re.search(r"compiling \d+ operators \(\d+ to \d+ s if quiet\)", err)
    assert "any shapes first" not in err


def test_the_expected_time_grows_with_the_number_of_operators():
    assert [_expected_time(n) for n in (30, 900, 2000, 9000)] == [
        "10 to 30 s",
        "40 s to 2 min",
        "80 s to 4 min",
        "5 to 16 min",
    ]


def test_threads_compile_one_after_another(uncompiled, tmp_path, example):
    errors = []

    def work(k):
        try:
            compiled(Soft(), tmp_path / f"{k}.pt2", example, dynamic=False)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all((tmp_path / f"{k}.pt2").exists() for k in range(4))
    assert len(uncompiled) == 1


def test_a_package_that_differs_is_not_written(uncompiled, tmp_path, example, monkeypatch):
    del uncompiled
    import torchcall._compile._run as run

    load = run.aoti_load_package

    def wrong(path):
        program = load(path)
        return lambda graph: {key: value + 1e-3 for key, value in program(graph).items()}

    monkeypatch.setattr(run, "aoti_load_package", wrong)
    (tmp_path / "m.pt2").write_text("before")
    with pytest.raises(torchcall.CompileError, match="expected the module's result to within"):
        compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    assert (tmp_path / "m.pt2").read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


def test_an_interruption_leaves_no_files(uncompiled, tmp_path, example, monkeypatch):
    del uncompiled
    import torchcall._compile._run as run

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "build", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    assert list(tmp_path.iterdir()) == []


def test_a_new_package_is_readable_by_others(uncompiled, tmp_path, example):
    del uncompiled
    path = compiled(Soft(), tmp_path / "m.pt2", example, dynamic=False)
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
