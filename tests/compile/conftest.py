"""What the tests of compilation share: modules, graphs, one real package, a cache of their own."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "mliap"))

import reference
from energies import Pairs

import torchcall


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
    """Nine atoms, one of them a phantom, as an `AtomGraphInput` of double precision."""
    return reference.graph([reference.systems()["triclinic"]])


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """A package of the energy-only Lennard-Jones module for any shapes, in double precision."""
    folder = tmp_path_factory.mktemp("package")
    graph = reference.graph([reference.systems()["triclinic"]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHCALL_CACHE", str(folder / "cache"))
        return torchcall.compile(
            Pairs(), folder / "pairs.pt2", example=graph, cutoff=reference.CUTOFF, dynamic=True
        )


@pytest.fixture
def uncompiled(monkeypatch):
    """Replaces torch's compiler and loader: packages are made in no time, of what was traced.

    Returns the metadata of each package that was built.
    """
    import torchcall._compile._run as events

    built, programs = [], {}

    def build(name, program, path, metadata, device):
        del name, device
        path.write_bytes(repr(metadata).encode())
        programs[path.read_bytes()] = program.module()
        built.append(metadata)

    def load(path):
        return programs[Path(path).read_bytes()]

    monkeypatch.setattr(events, "build", build)
    monkeypatch.setattr(events, "aoti_load_package", load)
    return built
