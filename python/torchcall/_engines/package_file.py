"""What an AOTInductor package (`.pt2`) says about itself, read without running anything in it."""

import json
import math
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchcall._engines.archive import checked_entries, pickled, refusal

FORMAT = 1
"""Of torchcall's own metadata; a reader refuses a newer one."""

METADATA_KEY = "torchcall"
_LARGEST_METADATA = 1 << 20  # bytes; ours is about one thousand
_PACKAGE = "an AOTInductor package (.pt2)"
_MODEL = "model"  # torch's name for the only model of a package


@dataclass(frozen=True)
class PackageMetadata:
    """What a package says about itself.

    Attributes:
        device: what it was compiled for: "cpu" or "cuda".
        platform, machine, isa: of the machine that it was compiled for: "linux", "x86_64" and the
            vector instructions that its code may use, such as "AVX512 AVX512_VNNI"; None where the
            torch that compiled it did not write them.
        torchcall: what `torchcall.compile` wrote (docs/packages.md has its keys); None in a
            package that was made by other means.
    """

    device: str
    platform: str | None = None
    machine: str | None = None
    isa: str | None = None
    torchcall: dict[str, Any] | None = None


def read_package(path: Path) -> PackageMetadata:
    """Reads the metadata of a package; nothing is loaded, compiled code least of all.

    Every byte of the file is compared with its checksum on the way.

    Args:
        path: a `.pt2` file.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        ValueError: it is no AOTInductor package, or a damaged one.
    """
    entries = checked_entries(path, _PACKAGE)
    libraries = {name: entry for name, entry in entries.items() if name.endswith(".so")}
    models = {name.split("/")[2] for name in libraries if name.startswith("data/aotinductor/")}
    if not models:
        raise pickled(path, _PACKAGE) if "data.pkl" in entries else _refusal(path, _kind(entries))
    if _MODEL not in models:
        found = ", ".join(sorted(models))
        raise _refusal(path, f"one that holds no model of the name 'model' but {found}")
    with zipfile.ZipFile(path) as archive:
        fields = _fields(path, archive, entries)
    if not fields.get("AOTI_DEVICE_KEY"):
        raise _refusal(path, "one whose metadata names no device")
    own = fields.get(METADATA_KEY)
    return PackageMetadata(
        device=fields["AOTI_DEVICE_KEY"],
        platform=fields.get("AOTI_PLATFORM") or None,
        machine=fields.get("AOTI_MACHINE") or None,
        isa=fields.get("AOTI_CPU_ISA") or None,
        torchcall=None if own is None else _own_metadata(path, own),
    )


def read_sources(path: Path) -> list[str]:
    """The C++ that a package's library was compiled from, where torch put it beside the library."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".cpp")]
        return [archive.read(name).decode(errors="replace") for name in names]


def _refusal(path: Path, got: str) -> Exception:
    return refusal(path, _PACKAGE, got)


def _kind(names: Collection[str]) -> str:
    if any(name.startswith("data/aotinductor/") for name in names):
        return "one without a compiled library (.so): made with package_cpp_only, or something else"
    if "constants.pkl" in names:
        return "a TorchScript archive"
    if any(name.endswith(("models/model.json", "exported_program.json")) for name in names):
        return (
            "an exported program that is not compiled (made by torch.export.save); "
            "torchcall.compile makes a package from the module itself"
        )
    return "a zip archive of another kind"


def _fields(
    path: Path, archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo]
) -> dict[str, str]:
    """The strings that torch keeps beside the compiled library."""
    folder = f"data/aotinductor/{_MODEL}/"
    found = [name for name in entries if name.startswith(folder)]
    found = [name for name in found if name.endswith("_metadata.json")]
    # One file for each source: torch reads the wrapper's where kernels have one of their own.
    found.sort(key=lambda name: not name.endswith(".wrapper_metadata.json"))
    if not found:
        raise _refusal(path, "one without metadata")
    entry = entries[found[0]]
    if entry.file_size > _LARGEST_METADATA:
        raise _refusal(path, f"one with {entry.file_size} bytes of metadata")
    fields = _json(path, archive.read(entry))
    if not isinstance(fields, dict) or not all(isinstance(v, str) for v in fields.values()):
        raise _refusal(path, "one whose metadata is no dictionary of strings")
    return fields


def _json(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"one whose metadata is no JSON: {error}") from error


_OWN: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "name": (str,),
    "torch": (str,),
    "device": (str,),
    "dtype": (str,),
    "cutoff": (int, float),
    "species": (list, type(None)),
    "compute_cell_gradients": (bool,),
    "inputs": (list,),
    "outputs": (list,),
    "capacity": (dict, type(None)),
    "minimum": (dict,),
    "content": (str,),
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
    for key, types in _OWN.items():
        if key not in own:
            raise _refusal(path, f"one whose torchcall metadata lacks {key!r}")
        if not isinstance(own[key], types) or (isinstance(own[key], bool) and bool not in types):
            raise _refusal(path, f"one whose torchcall metadata has {key!r}: {own[key]!r}")
    if not 0 < own["cutoff"] < math.inf:
        raise _refusal(path, f"one whose torchcall metadata has 'cutoff': {own['cutoff']!r}")
    for key in ("inputs", "outputs"):
        if not all(_is_tensor(row) for row in own[key]):
            raise _refusal(path, f"one whose torchcall metadata has {key!r}: {own[key]!r}")
    for key in ("capacity", "minimum"):
        sizes = own[key]
        if sizes is not None and not (
            set(sizes) == {"N", "E", "B"} and all(type(n) is int and n > 0 for n in sizes.values())
        ):
            raise _refusal(path, f"one whose torchcall metadata has {key!r}: {sizes!r}")
    return own


def _is_tensor(row: object) -> bool:
    """Whether this is `[name, dtype, shape]`, a shape being numbers and the names of axes."""
    if not isinstance(row, list) or len(row) != 3 or not isinstance(row[2], list):
        return False
    shape = all(n in ("N", "E", "B") or (type(n) is int and n >= 0) for n in row[2])
    return isinstance(row[0], str) and isinstance(row[1], str) and shape
