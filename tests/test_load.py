"""Model files: the formats that load, and the errors for all others."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from models import Linear, Scale, assert_same, double, error_of, torch_of
from torch import nn

import torchcall
from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def archive(tmp_path) -> Path:
    path = tmp_path / "model.pt"
    torch.jit.script(Linear()).save(path)
    return path


@pytest.fixture(params=["load", "wrapper", "wrapper of a str"])
def open_model(request):
    return {
        "load": torchcall.load,
        "wrapper": TorchModuleWrapper,
        "wrapper of a str": lambda path: TorchModuleWrapper(str(path)),
    }[request.param]


def test_loaded_archive_equals_eager_torch(archive, open_model):
    f = open_model(archive)
    assert_same(f(X), Linear()(torch_of(X)))
    assert_same(jax.jit(f)(X), Linear()(torch_of(X)))
    assert f.stats()["weights"] == "own"


def test_options_reach_the_wrapper(archive):
    f = torchcall.load(archive, freeze=True, input_spec=torch.float32)
    assert_same(f(X.astype(np.int32)), Linear()(torch_of(X)))
    with pytest.raises(TypeError):
        torchcall.load(archive, no_such_option=1)


def test_file_with_any_name_loads(tmp_path):
    path = tmp_path / "a name with spaces, ünïcode and no suffix"
    torch.jit.script(Linear()).save(path)
    assert_same(torchcall.load(path)(X), Linear()(torch_of(X)))


def test_saved_script_function_loads(tmp_path):
    torch.jit.script(double).save(str(tmp_path / "function.pt"))
    assert_same(torchcall.load(tmp_path / "function.pt")(X), 2 * X)


def test_archive_may_be_deleted_after_loading(archive):
    f = torchcall.load(archive)
    archive.unlink()
    assert_same(f(X), Linear()(torch_of(X)))


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def zip_of(path: Path, entries: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, text in entries.items():
            file.writestr(name, text)
    return path


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


BAD_FILES = [
    pytest.param(lambda p: p / "missing.pt", "no such file", id="missing"),
    pytest.param(lambda p: p, "a directory", id="a directory"),
    pytest.param(lambda p: write(p / "m.pt", b""), "an empty file", id="empty"),
    pytest.param(lambda p: write(p / "m.pt", b"hello, world\n" * 99), "no zip", id="text"),
    pytest.param(lambda p: write(p / "m.pt", bytes(range(256)) * 64), "no zip", id="noise"),
    pytest.param(lambda p: write(p / "m.pt", b"PK\x03\x04"), "zip", id="a zip's first bytes"),
    pytest.param(lambda p: zip_of(p / "m.zip", {}), "another kind", id="an empty zip"),
    pytest.param(
        lambda p: zip_of(p / "m.zip", {"a/b.txt": "c"}), "another kind", id="a zip of another kind"
    ),
    pytest.param(
        lambda p: zip_of(p / "m.pt", {"m/constants.pkl": "no pickle", "m/data.pkl": "nor this"}),
        "does not load",
        id="a zip that only looks like an archive",
    ),
    pytest.param(
        lambda p: zip_of(p / "m.pt2", {"m/data/aotinductor/model/x.so": "", "m/version": "3"}),
        ".pt2",
        id="an AOTInductor package",
    ),
    pytest.param(lambda p: fifo(p / "m.pt"), "regular file", id="a named pipe"),
    pytest.param(lambda p: p / ("m" * 300), "cannot be read", id="a name that is too long"),
]


@pytest.mark.parametrize("make, part", BAD_FILES)
def test_file_that_is_not_an_archive_is_described_in_the_error(make, part, tmp_path, open_model):
    path = make(tmp_path)
    text = error_of(lambda: open_model(path))
    assert str(path) in text or path.name in text
    assert part in text
    assert_same(TorchModuleWrapper(torch.jit.script(double))(X), 2 * X)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated_archive_is_an_error(archive, keep, open_model):
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * keep)])
    assert archive.name in error_of(lambda: open_model(archive))


def test_damaged_archive_is_an_error_wherever_the_damage_is(archive):
    data = archive.read_bytes()
    expected = Linear()(torch_of(X))
    refused = 0
    for start in range(0, len(data), max(1, len(data) // 80)):
        damaged = bytearray(data)
        damaged[start : start + 8] = bytes(b ^ 0xFF for b in damaged[start : start + 8])
        archive.write_bytes(damaged)
        f, text = None, ""
        try:
            f = torchcall.load(archive)
        except (ValueError, TypeError, OSError) as error:
            text = str(error)
        if f is None:
            refused += 1
            assert text.startswith("torchcall: ")
            assert archive.name in text
        else:
            assert_same(f(X), expected)  # the damage was in padding
    assert refused > 10


def test_archive_without_a_forward_is_an_error(tmp_path):
    module = torch.jit.script(NoForward())
    text = error_of(lambda: TorchModuleWrapper(module))
    assert "forward" in text
    module.save(tmp_path / "m.pt")
    text = error_of(lambda: torchcall.load(tmp_path / "m.pt"))
    assert "m.pt" in text
    assert "forward" in text


class NoForward(nn.Module):
    @torch.jit.export
    def other(self, x: torch.Tensor) -> torch.Tensor:
        return x


class TouchesFile:
    """Creates the file `trace` when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


FORMATS = [
    pytest.param(lambda o, p: torch.save(o, p), id="saved by torch"),
    pytest.param(
        lambda o, p: torch.save(o, p, _use_new_zipfile_serialization=False),
        id="in the legacy format",
    ),
    pytest.param(lambda o, p: p.write_bytes(pickle.dumps(o)), id="a bare pickle"),
    pytest.param(lambda o, p: p.write_bytes(pickle.dumps(o, protocol=0)), id="a text pickle"),
]


@pytest.mark.parametrize("save", FORMATS[:3])
def test_pickled_module_is_refused_with_the_reason_and_the_alternatives(save, tmp_path, open_model):
    trace = tmp_path / "trace"
    path = tmp_path / "model.pt"
    save([TouchesFile(trace)], path)
    text = error_of(lambda: open_model(path))
    assert "model.pt" in text
    assert "pickle" in text
    assert "code" in text
    assert "allow_pickle=True" in text
    assert "torch.jit.script" in text
    assert not trace.exists()


@pytest.mark.parametrize("save", FORMATS)
def test_nothing_is_unpickled_without_permission(save, tmp_path, open_model):
    trace = tmp_path / "trace"
    path = tmp_path / "model.pt"
    save([TouchesFile(trace)], path)
    error_of(lambda: open_model(path))
    error_of(lambda: torchcall.load(path, allow_pickle=False))
    assert not trace.exists()


@pytest.mark.parametrize("save", FORMATS[:2])
def test_pickled_eager_module_loads_with_allow_pickle(save, tmp_path):
    path = tmp_path / "model.pt"
    save(Scale(2.0), path)
    f = torchcall.load(path, allow_pickle=True)
    assert_same(f(X), Scale(2.0)(torch_of(X)))
    assert f.stats()["engine"] == "eager"


@pytest.mark.parametrize("save", FORMATS[:2])
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_state_dict_is_an_error(save, allow_pickle, tmp_path):
    path = tmp_path / "weights.pt"
    save(Linear().state_dict(), path)
    text = error_of(lambda: torchcall.load(path, allow_pickle=allow_pickle))
    assert "weights.pt" in text
    assert ("state dict" if allow_pickle else "allow_pickle=True") in text


def test_damaged_pickle_is_an_error(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(Scale(2.0), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:100])
    assert "model.pt" in error_of(lambda: torchcall.load(path, allow_pickle=True))


def test_pickle_of_an_unknown_class_is_an_error_that_names_its_module(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x02cno_such_module\nThing\n)\x81.")
    text = error_of(lambda: torchcall.load(path, allow_pickle=True))
    assert "model.pt" in text
    assert "no_such_module" in text


def test_allow_pickle_changes_nothing_for_an_archive(archive):
    assert_same(torchcall.load(archive, allow_pickle=True)(X), Linear()(torch_of(X)))


BAD_MODELS = [
    pytest.param(3, "int", id="an int"),
    pytest.param(None, "NoneType", id="None"),
    pytest.param(Linear().state_dict(), "OrderedDict", id="a state dict"),
    pytest.param(io.BytesIO(b""), "BytesIO", id="an open file"),
    pytest.param(Linear, "the class Linear", id="a class"),
]


@pytest.mark.parametrize("model, got", BAD_MODELS)
def test_object_that_is_not_a_model_is_an_error(model, got):
    text = error_of(lambda: TorchModuleWrapper(model))
    assert "expected a torch.nn.Module, a TorchScript module or function" in text
    assert got in text


@pytest.mark.parametrize(
    "options, parts",
    [
        ({"cuda_graph": "always"}, ["cuda_graph", "'auto'", "'always'"]),
        ({"requires_grad": "yes"}, ["requires_grad", "expected True or False", "'yes'"]),
        ({"freeze": None}, ["freeze", "expected True or False", "None"]),
        (
            {"vmap_method": 3},
            ["vmap_method", "'sequential' or 'expand_dims' or 'broadcast_all'", "got 3"],
        ),
        ({"vmap_method": "torch"}, ["vmap_method", "TorchScript", "got 'torch'"]),
    ],
    ids=[
        "an unknown cuda_graph mode",
        "requires_grad",
        "freeze",
        "vmap_method of another type",
        "vmap_method torch",
    ],
)
def test_invalid_option_is_an_error_that_names_it(options, parts):
    text = error_of(lambda: TorchModuleWrapper(torch.jit.script(double), **options))
    for part in parts:
        assert part in text
