"""`torchcall.models.load`: what it recognises, and what it does not run."""

import hashlib
import pickle
import threading
import time
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from models import run_python

from torchcall import models
from torchcall.mliap import AtomGraph, TorchMliap, edge_vectors, energy, neighbor_list
from torchcall.models import _common, _load, _packages


class Gaussians(torch.nn.Module):
    """E = Σ over edges of exp(-r²), with a smooth end at the cutoff."""

    cutoff = 4.0
    species = (14,)

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        square = edge_vectors(input).square().sum(1)
        pairs = torch.exp(-square) * (1 - square / 16).clamp(min=0) ** 2
        system = input["batch"].index_select(0, input["edge_index"][0])
        total = torch.zeros(input["cell"].size(0), dtype=pairs.dtype)
        return total.index_add(0, system, pairs)


def graph():
    positions = np.array([[0, 0, 0], [1, 0, 0], [0, 1.5, 0]], np.float32)
    cell, pbc = 20 * np.eye(3, dtype=np.float32)[None], np.zeros((1, 3), bool)
    batch = np.zeros(3, np.int32)
    neighbors = neighbor_list(4.0).allocate(positions, cell, pbc, batch)
    return AtomGraph.from_neighbors(neighbors, positions, cell, np.full(3, 14, np.int32))


def expected_energy():
    squares = np.array([1, 2.25, 3.25])
    return 2 * np.sum(np.exp(-squares) * (1 - squares / 16) ** 2)


@pytest.mark.parametrize("engine", ["auto", "eager", "script"])
def test_a_module_of_energies_is_loaded_and_reported(engine, capsys):
    model = models.load(Gaussians(), engine=engine)
    name = "eager" if engine == "eager" else "TorchScript"
    assert capsys.readouterr().err == f"torchcall: Gaussians: cutoff 4 Å, 1 elements, {name}\n"
    found = jax.jit(energy)(model, graph())
    np.testing.assert_allclose(found, [expected_energy()], rtol=1e-6)


def test_an_archive_is_loaded_with_its_own_cutoff(tmp_path, capsys):
    class WithCutoff(Gaussians):
        def __init__(self):
            super().__init__()
            self.cutoff = 4.0

    path = tmp_path / "gaussians.pt"
    torch.jit.script(WithCutoff()).save(str(path))
    model = models.load(path, verbose=False)
    assert capsys.readouterr().err == ""
    np.testing.assert_allclose(energy(model, graph()), [expected_energy()], rtol=1e-6)


def test_what_is_not_recognised_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a file or one of .*7net-0.*got '8net'"):
        models.load("8net")
    with pytest.raises(ImportError, match=r"pip install 'torchcall\[sevennet\]'"):
        models.load(Path("7net-0"))  # a Path may be a name too
    with pytest.raises(TypeError, match=r"^torchcall: models.load: dtype: .*got 'float16'"):
        models.load(Gaussians(), dtype="float16")
    with pytest.raises(ValueError, match=r"kind: expected 'auto' or one of .*got 'mice'"):
        models.load(Gaussians(), kind="mice")
    with pytest.raises(ValueError, match="known network, got a int"):
        models.load(3)  # pyright: ignore
    with pytest.raises(ValueError, match=r"engine: expected 'auto'.*got 'fast'"):
        models.load(Gaussians(), engine="fast")  # pyright: ignore
    with pytest.raises(ValueError, match="device: expected 'cpu' or 'cuda', got 'mps'"):
        models.load(Gaussians(), device="mps")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected 'cpu', because torch cannot use"):
            models.load(Gaussians(), device="cuda", engine="eager")
    (tmp_path / "text.pt").write_text("no model")
    with pytest.raises(ValueError, match="expected a TorchScript archive"):
        models.load(tmp_path / "text.pt")


def test_files_that_are_no_models_are_errors_of_ours(tmp_path, monkeypatch):
    torch.save({"key": 1}, tmp_path / "dict.pt")
    with pytest.raises(ValueError, match=r"^torchcall: .*got a pickle of something else"):
        models.load(tmp_path / "dict.pt")
    with pytest.raises(IsADirectoryError, match=r"^torchcall: .*got the directory"):
        models.load(tmp_path)

    def load(source, **_):
        return {}[source]

    whole = (tmp_path / "dict.pt").read_bytes()
    for size in (0, 100, len(whole) - 1):
        (tmp_path / "cut.model").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"^torchcall: .*cut\.model: expected .*, got a"):
            models.load(tmp_path / "cut.model", head="default")

    monkeypatch.setattr(models.sevennet, "load", load)
    with pytest.raises(ValueError, match=r"^torchcall: .*kind='sevennet', got .*KeyError"):
        models.load(tmp_path / "dict.pt", kind="sevennet")


def test_a_checkpoint_with_a_damaged_entry_is_an_error(tmp_path, monkeypatch):
    """torch reads its weights as if all were well."""
    path = tmp_path / "weights.pt"
    torch.save({"model_state_dict": torch.ones(1000), "_type_map": {}}, path)
    monkeypatch.setattr(models.sevennet, "load", lambda *_, **__: pytest.fail("was loaded"))
    content = path.read_bytes()
    place = content.index(np.ones(100, np.float32).tobytes())
    path.write_bytes(content[:place] + b"\1" + content[place + 1 :])
    assert torch.load(path)["model_state_dict"][0] != 1
    with pytest.raises(ValueError, match=r"kind='sevennet', got a damaged file: the checksum of"):
        models.load(path)


def test_one_thread_at_a_time_loads_a_network():
    inside, most, start = [0], [0], threading.Barrier(3)

    @_common.one_at_a_time
    def load(pause):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(pause)
        inside[0] -= 1

    def work():
        start.wait()
        load(0.02)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1]
    networks = (models.chgnet, models.mace, models.nequip, models.own, models.sevennet)
    assert all(hasattr(network.load, "__wrapped__") for network in networks)


def test_an_unknown_option_is_an_error_that_lists_the_networks_own():
    with pytest.raises(TypeError, match=r"^torchcall: .*bogus: .*kind='own' \(cutoff, gradients\)"):
        models.load(Gaussians(), bogus=1)
    with pytest.raises(TypeError, match=r"kind='sevennet' \(modal\)"):
        models.load("7net-0", head="default")


class Dangerous:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_is_recognised_without_running_it(tmp_path, protocol):
    path, created = tmp_path / "model.pkl", tmp_path / "created"
    path.write_bytes(pickle.dumps({"key": Dangerous(created)}, protocol=protocol))
    torch.save(Dangerous(created), tmp_path / "model.pt")
    assert "io.open" in _common.pickled_names(path)
    assert "key" in _common.pickled_strings(path)
    assert "io.open" in _common.pickled_names(tmp_path / "model.pt")
    for source in (path, tmp_path / "model.pt"):
        with pytest.raises((ValueError, FileNotFoundError)):
            models.load(source)
    assert not created.exists()


def test_parts_are_imported_when_they_are_used(tmp_path):
    run_python(
        tmp_path,
        "import sys, torchcall\n"
        "assert not {'torchcall.mliap', 'torchcall.models'} & set(sys.modules)\n"
        "assert torchcall.models.load.__module__ == 'torchcall.models._load'\n"
        "assert torchcall.mliap is sys.modules['torchcall.mliap']\n"
        "assert not hasattr(torchcall, 'other')\n"
        "compilers = {'torch._dynamo', 'torch._inductor', 'sympy'}\n"
        "assert not compilers & set(sys.modules), 'takes seconds, and only compilation needs it'\n",
        fresh=True,  # the process that others are forked from has imported torch's compiler
    )


@pytest.mark.parametrize("kind", sorted(set(_load._NETWORKS) - {"own"}))
def test_the_packages_of_every_network_are_recorded(kind, tmp_path):
    (tmp_path / "model").write_bytes(b"weights")
    assert _packages.record_of(_load._NETWORKS[kind], tmp_path / "model", {}) is not None


def test_a_missing_package_is_an_error_that_names_the_extra():
    with pytest.raises(ImportError, match=r"pip install 'torchcall\[mace\]'"):
        _common.require("no_such_package", "mace")


def test_a_package_is_found_again_by_what_determines_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path / "cache"))
    adapter = tmp_path / "adapter.py"
    adapter.write_text("code")
    network = types.ModuleType("network")
    network.__file__, network.DISTRIBUTIONS = str(adapter), ("numpy",)
    file = tmp_path / "model"
    file.write_bytes(b"weights")
    record = _packages.record_of(network, file, {"head": None})
    assert record is not None
    assert _packages.record_of(network, Gaussians(), {}) is None
    assert _packages.from_record(record, {}) is None

    code = b"code and weights"
    package = tmp_path / "cache" / f"key-{hashlib.sha256(code).hexdigest()}.pt2"
    package.parent.mkdir()
    package.write_bytes(code)
    _packages.write_record(record, package)
    assert _packages.from_record(record, {}) is None  # its bytes are no package
    loaded = []
    monkeypatch.setattr(TorchMliap, "from_package", loaded.append)
    _packages.from_record(record, {})
    assert loaded == [package]
    package.write_bytes(code.replace(b"w", b"W"))
    assert _packages.from_record(record, {}) is None  # damaged: not even loaded
    assert loaded == [package]

    assert _packages.record_of(network, file, {"head": None}) == record
    assert _packages.record_of(network, file, {"head": "other"}) != record
    file.write_bytes(b"other weights")
    assert _packages.record_of(network, file, {"head": None}) != record
    file.write_bytes(b"weights")
    adapter.write_text("other code")
    assert _packages.record_of(network, file, {"head": None}) != record


def test_packages_with_and_without_second_derivatives_are_different_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path))
    file, made, loaded = tmp_path / "model", [], []
    file.write_bytes(b"weights")

    def load(_, *, verbose, second_derivatives=False, **__):
        assert not verbose
        made.append(second_derivatives)
        code = repr(second_derivatives).encode()
        package = tmp_path / f"key-{hashlib.sha256(code).hexdigest()}.pt2"
        package.write_bytes(code)
        part = types.SimpleNamespace
        return part(wrapper=part(_source=part(path=package)))

    monkeypatch.setattr(models.chgnet, "load", load)
    monkeypatch.setattr(TorchMliap, "from_package", lambda path, **_: loaded.append(path) or path)
    options: list[dict[str, Any]] = [{}, {"second_derivatives": True}]
    for each in options:
        models.load(file, kind="chgnet", engine="package", verbose=False, **each)
    assert made == [False, True]
    for each in options:
        models.load(file, kind="chgnet", engine="package", verbose=False, **each)
    assert len(made) == len(set(loaded)) == 2


def test_a_model_with_gradients_of_its_own_refuses_options_for_energies():
    class Zero(torch.nn.Module):
        def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"energy": input["cell"][:, 0, 0], "position_gradients": 0 * input["pos"]}

    options: list[dict[str, Any]] = [{"second_derivatives": True}, {"example": graph()}]
    for option in options:
        with pytest.raises(ValueError, match=rf"{next(iter(option))}: expected None"):
            models.load(Zero(), cutoff=3.0, gradients=True, **option)
