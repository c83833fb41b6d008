"""Fixtures for the tests of compilation: an example, a compiled package, a private cache."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "mliap"))

import reference
from compiled_tree import tree  # noqa: F401
from engines import package  # noqa: F401


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCHCALL_PROGRESS", raising=False)


@pytest.fixture
def example():
    """An `AtomGraphInput` in float64 with nine atoms, one of them a phantom."""
    return reference.graph([reference.systems()["triclinic"]])


@pytest.fixture
def uncompiled(monkeypatch):
    """Replaces torch's compiler and loader by functions that run the program.

    Returns the list of the metadata of all packages built so far.
    """
    import torchcall._compile._run as run

    built, programs = [], {}

    def build(name, program, path, metadata, configs, derivative):
        del name, configs
        path.write_bytes(repr(metadata).encode())
        is_graph = isinstance(program, torch.fx.GraphModule)
        programs[path.read_bytes()] = program if is_graph else program.module(), derivative
        built.append(metadata)

    def load(path, name="model"):
        return programs[Path(path).read_bytes()][name == "derivative"]

    monkeypatch.setattr(run, "build", build)
    monkeypatch.setattr(run, "aoti_load_package", load)
    monkeypatch.setattr(run, "load_package", load)
    return built
