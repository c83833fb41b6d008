"""Which package in the cache belongs to a source, so that loading it again skips the network.

Otherwise a network is imported, built and traced before its package is found: seconds to minutes.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from torchcall import __version__
from torchcall._compile._folder import cache_folder, digest_of
from torchcall.mliap import TorchMliap


def record_of(network: ModuleType, source: object, options: dict[str, Any]) -> Path | None:
    """The file that records the package of a source; None for a module in memory.

    Its name is a hash of what determines the package: the file's content, or the name and the
    version of the network's package; the options; the versions of torch, torchcall and the
    network's packages; and the code of `torchcall.models`. The package itself records its
    processor.

    Args:
        network: a module of `torchcall.models`. Its `DISTRIBUTIONS` are the packages that it uses;
            without them, nothing is recorded.
        source: what the user passed.
        options: what the package depends on; an option that JSON cannot represent gives None.
    """
    if not isinstance(source, str | Path) or not hasattr(network, "DISTRIBUTIONS"):
        return None
    path = Path(source)
    content = digest_of(path) if path.is_file() else str(source).lower()
    versions = {name: _version(name) for name in network.DISTRIBUTIONS}
    versions |= {"torch": torch.__version__, "torchcall": __version__}
    code = hashlib.sha256()
    for file in sorted(Path(str(network.__file__)).parent.glob("*.py")):
        code.update(file.read_bytes())
    try:
        text = json.dumps([content, options, versions, code.hexdigest()], sort_keys=True)
    except TypeError:
        return None
    return cache_folder() / "models" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def from_record(record: Path, options: dict[str, Any]) -> TorchMliap | None:
    """The potential that a record names; None if there is no record or no usable package.

    A package whose bytes have changed is not used: its weights might be wrong ones.
    A wrong option also gives None: building the potential then reports it.
    """
    try:
        package = cache_folder() / json.loads(record.read_text())["package"]
        if package.stem.rpartition("-")[2] != digest_of(package):
            return None
        return TorchMliap.from_package(package, **options)
    except (OSError, KeyError, TypeError, ValueError):
        return None


def write_record(record: Path, package: Path) -> None:
    """Records a package of the cache. Does nothing if the cache cannot be written."""
    if package.parent != cache_folder():
        return
    text = json.dumps({"package": package.name})
    temporary = record.parent / f".{record.stem}-{secrets.token_hex(8)}"
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        os.replace(temporary, record)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
