"""Reading a package's metadata, and errors for files that are not packages."""

import json
import pickle
import zipfile

import pytest
import torch

from torchcall._engines.package_file import PackageMetadata, read_package

FOLDER = "m/data/aotinductor/model/"
OWN = {
    "format": 2,
    "name": "Model",
    "torch": "2.13.0",
    "device": "cpu",
    "inputs": [
        {"name": "pos", "dtype": "float32", "shape": ["N", 3]},
        {"name": "index", "dtype": "int64", "shape": ["N"], "rows_of": "pos"},
        {"name": "kind", "dtype": "int64", "shape": ["N"], "members": [6, 14]},
    ],
    "outputs": [{"name": "energy", "dtype": "float32", "shape": [1]}],
    "axes": {"N": {"minimum": 2, "maximum": None, "capacity": None}},
    "content": "00",
    "user": {},
}


def fields(**more):
    return {"AOTI_DEVICE_KEY": "cpu", "AOTI_CPU_ISA": "AVX2"} | more


def write(path, metadata, *, so="x.wrapper.so", folder=FOLDER):
    with zipfile.ZipFile(path, "w") as archive:
        if so is not None:
            archive.writestr(folder + so, "code")
        if metadata is not None:
            text = metadata if isinstance(metadata, str) else json.dumps(metadata)
            archive.writestr(folder + "x.wrapper_metadata.json", text)
        archive.writestr("m/archive_format", "pt2")
    return path


def error_of(path):
    with pytest.raises((ValueError, OSError)) as caught:
        read_package(path)
    text = str(caught.value)
    assert text.startswith("torchcall: ")
    assert path.name in text
    return text


def test_metadata_of_torchcall_are_read(tmp_path):
    path = write(tmp_path / "m.pt2", fields(torchcall=json.dumps(OWN), AOTI_MACHINE="x86_64"))
    assert read_package(path) == PackageMetadata("cpu", None, "x86_64", "AVX2", OWN)


def test_a_package_of_another_origin_has_no_metadata_of_torchcall(tmp_path):
    assert read_package(write(tmp_path / "m.pt2", fields())).torchcall is None


def test_the_wrappers_metadata_are_read_if_kernels_have_metadata_too(tmp_path):
    path = write(tmp_path / "m.pt2", fields(AOTI_MACHINE="right"))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(FOLDER + "a.kernel_metadata.json", json.dumps(fields(AOTI_MACHINE="no")))
    assert read_package(path).machine == "right"


FILES = [
    pytest.param(lambda p: p, "a directory", id="a directory"),
    pytest.param(lambda p: p / "missing.pt2", "no such file", id="missing"),
    pytest.param(lambda p: p / ("m" * 300), "cannot be read", id="a name that is too long"),
    pytest.param(lambda p: _bytes(p, b""), "an empty file", id="empty"),
    pytest.param(lambda p: _bytes(p, b"hello" * 99), "no zip archive", id="text"),
    pytest.param(lambda p: _bytes(p, pickle.dumps([1])), "a pickle", id="a bare pickle"),
    pytest.param(lambda p: _torch_save(p), "a pickle", id="a saved tensor"),
    pytest.param(lambda p: _zip(p, "m/a.txt"), "another kind", id="a foreign zip"),
    pytest.param(lambda p: _script(p), "a TorchScript archive", id="TorchScript"),
    pytest.param(
        lambda p: _zip(p, "m/models/model.json"), "torch.export.save", id="an exported program"
    ),
    pytest.param(
        lambda p: write(p / "m.pt2", fields(), so=None), "without a compiled library", id="no code"
    ),
    pytest.param(
        lambda p: write(p / "m.pt2", fields(), folder="m/data/aotinductor/two/"),
        "its models: two",
        id="a model of another name",
    ),
    pytest.param(lambda p: write(p / "m.pt2", None), "without metadata", id="no metadata"),
    pytest.param(lambda p: write(p / "m.pt2", {}), "no device", id="no device"),
    pytest.param(lambda p: write(p / "m.pt2", "{"), "not JSON", id="not JSON"),
    pytest.param(lambda p: write(p / "m.pt2", "[" * 99999), "not JSON", id="deeply nested JSON"),
    pytest.param(lambda p: write(p / "m.pt2", [1]), "dictionary of strings", id="a list"),
    pytest.param(lambda p: write(p / "m.pt2", " " * (2 << 20)), "bytes of metadata", id="huge"),
]


def _bytes(folder, data):
    (folder / "m.pt2").write_bytes(data)
    return folder / "m.pt2"


def _torch_save(folder):
    torch.save(torch.ones(2), folder / "m.pt2")
    return folder / "m.pt2"


def _script(folder):
    torch.jit.script(torch.nn.Identity()).save(folder / "m.pt2")
    return folder / "m.pt2"


def _zip(folder, name):
    with zipfile.ZipFile(folder / "m.pt2", "w") as archive:
        archive.writestr(name, "x")
    return folder / "m.pt2"


@pytest.mark.parametrize("make, part", FILES)
def test_another_file_is_an_error_that_says_what_it_is(make, part, tmp_path):
    assert part in error_of(make(tmp_path))


def first(**more):
    return {"inputs": [OWN["inputs"][0] | more, *OWN["inputs"][1:]]}


CHANGES = [
    ({"format": 1}, "of format 2, got 1"),
    ({"format": 3}, "of format 2, got 3"),
    ({"format": True}, "has no format"),
    ({"name": 3}, "'name': 3"),
    ({"user": []}, "'user': []"),
    ({"axes": {"N": {"minimum": 2}}}, "'axes'"),
    ({"axes": {"N": {"minimum": 2, "maximum": None, "capacity": -1}}}, "'axes'"),
    ({"axes": {"N": {"minimum": None, "maximum": None, "capacity": None}}}, "'axes'"),
    ({"inputs": [["pos", "float32", [3]]]}, "'inputs'"),
    (first(shape=["Z"]), "'inputs'"),
    (first(shape=[-1]), "'inputs'"),
    (first(rows_of="nothing"), "'rows_of': 'nothing'"),
    (first(members=[]), "'members': []"),
    (first(members=[128]), "'members': [128]"),
    (first(members=6), "'members': 6"),
    ({"outputs": [{"name": "energy", "dtype": "float32", "shape": ["Z"]}]}, "'outputs'"),
]


@pytest.mark.parametrize("change, part", CHANGES, ids=[str(change) for change, _ in CHANGES])
def test_invalid_metadata_are_an_error_that_names_the_key(change, part, tmp_path):
    assert part in error_of(write(tmp_path / "m.pt2", fields(torchcall=json.dumps(OWN | change))))


@pytest.mark.parametrize("key", [key for key in OWN if key != "format"])
def test_a_missing_key_of_the_metadata_is_an_error_that_names_it(key, tmp_path):
    own = {name: value for name, value in OWN.items() if name != key}
    path = write(tmp_path / "m.pt2", fields(torchcall=json.dumps(own)))
    assert f"lacks {key!r}" in error_of(path)


def test_a_changed_byte_is_an_error_or_in_padding(tmp_path):
    path = write(tmp_path / "m.pt2", fields(torchcall=json.dumps(OWN)))
    data, expected, messages = path.read_bytes(), read_package(path), []
    for k in range(0, len(data), 3):
        path.write_bytes(data[:k] + bytes([data[k] ^ 0x55]) + data[k + 1 :])
        found = expected
        try:
            found = read_package(path)
        except (ValueError, OSError) as error:
            messages.append(str(error))
        assert found == expected
    assert len(messages) > len(data) // 6
    assert all(message.startswith("torchcall: ") for message in messages)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_package_is_an_error(keep, tmp_path):
    path = write(tmp_path / "m.pt2", fields())
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    error_of(path)
