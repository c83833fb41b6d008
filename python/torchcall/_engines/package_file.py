"""Reads the metadata of AOTInductor packages (`.pt2`) without loading their code."""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchcall._engines.archive import PACKAGE, check_archive, refusal

FORMAT = 2
"""The version of torchcall's metadata. Packages of another version are refused."""

METADATA_KEY = "torchcall"
_LARGEST_METADATA = 1 << 20  # bytes; torchcall writes about one thousand
MODEL = "model"
"""torch's name for a package's only program."""
DERIVATIVE = "derivative"
"""The name of the second program of a package with gradients, see `CompiledDerivative`."""


@dataclass(frozen=True)
class PackageMetadata:
    """The metadata of a package.

    Attributes:
        device: the kind of device that it was compiled for: "cpu" or "cuda".
        platform, machine, isa: the machine that it was compiled for, such as "linux", "x86_64" and
            "AVX512 AVX512_VNNI", the vector instructions that its code may use. None if the package
            does not state them.
        torchcall: metadata of `torchcall.compile` or `torchcall.mliap.compile` (docs/packages.md
            lists the keys); None for packages that torchcall did not make.
    """

    device: str
    platform: str | None = None
    machine: str | None = None
    isa: str | None = None
    torchcall: dict[str, Any] | None = None


def read_package(path: Path) -> PackageMetadata:
    """Reads the metadata of a package without loading its code; verifies all checksums.

    Args:
        path: a `.pt2` file.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        ValueError: it is not an AOTInductor package, or it is damaged.
    """
    entries = check_archive(path, PACKAGE)
    libraries = (name for name in entries if name.endswith(".so"))
    models = {name.split("/")[2] for name in libraries if name.startswith("data/aotinductor/")}
    if MODEL not in models:
        found = ", ".join(sorted(models))
        raise _refusal(path, f"one without a model named 'model'; its models: {found}")
    with zipfile.ZipFile(path) as archive:
        fields = _fields(path, archive, entries)
    if not fields.get("AOTI_DEVICE_KEY"):
        raise _refusal(path, "one whose metadata has no device")
    text = fields.get(METADATA_KEY)
    own = None if text is None else _own_metadata(path, text)
    if own is not None and own.get("gradients") and DERIVATIVE not in models:
        raise _refusal(path, f"one with gradients but without a model named {DERIVATIVE!r}")
    return PackageMetadata(
        device=fields["AOTI_DEVICE_KEY"],
        platform=fields.get("AOTI_PLATFORM") or None,
        machine=fields.get("AOTI_MACHINE") or None,
        isa=fields.get("AOTI_CPU_ISA") or None,
        torchcall=own,
    )


def read_sources(path: Path) -> list[str]:
    """The C++ sources of a package's library; torch may have stored them beside the library."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".cpp")]
        return [archive.read(name).decode(errors="replace") for name in names]


def _refusal(path: Path, got: str) -> Exception:
    return refusal(path, PACKAGE, got)


def _fields(
    path: Path, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]
) -> dict[str, str]:
    """The metadata that torch stores beside the compiled library."""
    folder = f"data/aotinductor/{MODEL}/"
    found = [name for name in entries if name.startswith(folder)]
    found = [name for name in found if name.endswith("_metadata.json")]
    # One file per source. torch reads the wrapper's, if kernels have files, too.
    found.sort(key=lambda name: not name.endswith(".wrapper_metadata.json"))
    if not found:
        raise _refusal(path, "one without metadata")
    entry = entries[found[0]]
    if entry.file_size > _LARGEST_METADATA:
        raise _refusal(
            path, f"one with {entry.file_size} bytes of metadata, more than {_LARGEST_METADATA}"
        )
    fields = _json(path, archive.read(entry))
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
        raise _refusal(path, "one whose metadata is not a dictionary of strings")
    return fields


def _json(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"one whose metadata is not JSON: {error}") from error


_KEYS: dict[str, type] = {
    "name": str,
    "torch": str,
    "device": str,
    "inputs": list,
    "outputs": list,
    "axes": dict,
    "content": str,
    "user": dict,
}


def _own_metadata(path: Path, text: str) -> dict[str, Any]:
    own = _json(path, text)
    if not isinstance(own, dict) or type(own.get("format")) is not int:
        raise _refusal(path, "one whose torchcall metadata has no format")
    if own["format"] != FORMAT:
        raise ValueError(
            f"torchcall: {path}: expected torchcall metadata of format {FORMAT}, got "
            f"{own['format']}: the package was made by another version of torchcall; compile the "
            "model again"
        )
    for key, kind in _KEYS.items():
        if key not in own:
            raise _refusal(path, f"one whose torchcall metadata lacks {key!r}")
        if not isinstance(own[key], kind):
            raise _refusal(path, f"one whose torchcall metadata has {key!r}: {own[key]!r}")
    if not all(map(_is_axis, own["axes"].values())):
        raise _refusal(path, f"one whose torchcall metadata has 'axes': {own['axes']!r}")
    for key in ("inputs", "outputs"):
        if not all(_is_row(row, own["axes"]) for row in own[key]):
            raise _refusal(path, f"one whose torchcall metadata has {key!r}: {own[key]!r}")
    names = [row["name"] for row in own["inputs"]]
    for row in own["inputs"]:
        if not _has_valid_checks(row, names):
            raise _refusal(path, f"one whose torchcall metadata has an input {row!r}")
    if not _has_valid_gradients(own):
        raise _refusal(path, f"one whose torchcall metadata has 'gradients': {own['gradients']!r}")
    return own


def is_float(row: dict[str, Any]) -> bool:
    """Whether an input or output has real floating-point entries."""
    return row["dtype"].startswith(("float", "bfloat"))


def _has_valid_gradients(own: dict[str, Any]) -> bool:
    """Whether `gradients`, if given, is a list of names of float inputs, the cotangents fit.

    The sizes of outputs are then those of inputs.
    """
    names = own.get("gradients", [])
    floats = [row["name"] for row in own["inputs"] if is_float(row)]
    if not isinstance(names, list) or not all(name in floats for name in names):
        return False
    known = {size for row in own["inputs"] for size in row["shape"]}
    sizes = {size for row in own["outputs"] for size in row["shape"] if isinstance(size, str)}
    return not names or sizes <= known


def _is_axis(axis: object) -> bool:
    """Whether `axis` is `{"minimum": n, "maximum": n or None, "capacity": n or None}`."""
    if not isinstance(axis, dict) or set(axis) != {"minimum", "maximum", "capacity"}:
        return False
    limits = [limit for limit in axis.values() if limit is not None]
    return type(axis["minimum"]) is int and all(type(n) is int and n >= 0 for n in limits)


def _is_row(row: object, axes: dict[str, Any]) -> bool:
    """Whether `row` has a name, a dtype and a shape of sizes and names of axes."""
    if not isinstance(row, dict) or not isinstance(row.get("shape"), list):
        return False
    texts = isinstance(row.get("name"), str) and isinstance(row.get("dtype"), str)
    return texts and all(
        size in axes if isinstance(size, str) else type(size) is int and size >= 0
        for size in row["shape"]
    )


def _has_valid_checks(row: dict[str, Any], names: list[str]) -> bool:
    """Whether `rows_of` is the name of an input, and `members` a list of numbers from 0 to 127."""
    members = row.get("members", [0])
    numbers = isinstance(members, list) and all(type(n) is int and 0 <= n < 128 for n in members)
    return numbers and bool(members) and row.get("rows_of", names[0]) in names
