"""Packages made without torchcall, in which torch does not record its version."""

import json
import os
import re
import subprocess
import zipfile

import graphs
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from engines import package  # noqa: F401
from reference import CUTOFF, one_thread  # noqa: F401

import torchcall
from torchcall.mliap import TorchMliap, pad_graph
from torchcall.mliap._input import output_specs

pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture
def foreign(package, tmp_path):  # noqa: F811
    """Copies the package without torchcall's metadata; `changes` maps file suffixes to edits."""

    def make(**changes):
        path = tmp_path / "foreign.pt2"
        with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
            for entry in source.infolist():
                content = source.read(entry)
                if entry.filename.endswith("metadata.json"):
                    fields = json.loads(content)
                    del fields["torchcall"]
                    content = json.dumps(fields).encode()
                change = changes.get(entry.filename.rpartition(".")[2])
                content = change(content) if change else content
                if content is not None:
                    target.writestr(entry, content)
        return path

    return make


def removed(content):
    del content


@pytest.mark.parametrize(
    "changes", [{}, {"cpp": removed}], ids=["with its source", "without its source"]
)
def test_foreign_package_runs_under_the_torch_that_compiled_it(package, foreign, changes):  # noqa: F811
    graph = pad_graph(graphs.atom_graph([reference.systems()["slab"]]), cutoff=CUTOFF)[0]
    index = ("edge_index", "batch", "atomic_numbers")
    graph |= {key: graph[key].astype(jnp.int64) for key in index}
    f = torchcall.load(
        foreign(**changes), output_spec=lambda g: output_specs(g, compute_cell_gradients=True)
    )
    for key, value in torchcall.load(package)(graph).items():
        np.testing.assert_array_equal(f(graph)[key], value)


def test_foreign_package_with_source_for_another_torch_is_refused(foreign):
    def older(content):
        return content.replace(b"num_models must be", b"it must be")

    expected = f"foreign.pt2: expected a package compiled for torch {torch.__version__}, got one"
    with pytest.raises(ValueError, match=re.escape(expected) + " for another torch"):
        torchcall.load(foreign(cpp=older))


def test_library_that_needs_functions_missing_in_this_torch_is_refused(foreign, tmp_path):
    code, library = tmp_path / "later.cc", tmp_path / "later.so"
    code.write_text('extern "C" int aoti_of_tomorrow(); int f() { return aoti_of_tomorrow(); }')
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, code], check=True)

    def later(content):
        del content
        return library.read_bytes()

    with pytest.raises(ValueError, match="aoti_of_tomorrow") as caught:
        torchcall.load(foreign(cpp=removed, so=later))
    assert f"does not load with torch {torch.__version__}; if another torch" in str(caught.value)


def test_foreign_package_is_refused_as_a_potential(foreign):
    with pytest.raises(ValueError, match=r"expected a package made by torchcall\.mliap\.compile"):
        TorchMliap.from_package(foreign())
