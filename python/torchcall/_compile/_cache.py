"""The cache of compiled packages. The key is a hash of everything that determines a package."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa

from torchcall._compile._folder import cache_folder


def key_of(metadata: dict[str, Any], options: dict[str, Any]) -> str:
    """SHA-256 of everything that determines a package.

    Args:
        metadata: the package's; contains a hash of the graph and weights, torch's version, the
            device and the capacity.
        options: the options of torch's compiler.
    """
    isa = str(pick_vec_isa())
    if metadata["device"] == "cuda":
        isa += f" {torch.cuda.get_device_capability()} {torch.version.cuda}"
    text = json.dumps([metadata, options, isa, os.uname().machine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find(key: str, to: Path | None = None) -> Path | None:
    """The undamaged entry for a key, or None. It is copied to `to`, if given.

    An entry's name ends in the hash of its bytes, which is compared with that of the copy. Damaged
    entries are removed.
    """
    with contextlib.suppress(OSError):
        for entry in sorted(cache_folder().glob(f"{key}-*.pt2")):
            read = entry if to is None else shutil.copyfile(entry, to)
            if entry.stem.rpartition("-")[2] == _hash_of(read):
                return entry
            entry.unlink()
    return None


def store(key: str, package: Path) -> None:
    """Copies a package into the cache. Does nothing if the cache cannot be written.

    The copy is written to a temporary file and renamed, so no reader sees an incomplete entry.
    """
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_beside(folder / f"{key}.pt2") as copy:
            shutil.copyfile(package, copy)
            os.replace(copy, folder / f"{key}-{_hash_of(copy)}.pt2")


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new empty `.pt2` file in the folder of `path`, removed at the end unless it was renamed.

    Raises:
        OSError: the folder cannot be written.
    """
    # Not by `tempfile`: only the owner could read its files.
    name = path.parent / f".{path.stem[:40]}-{secrets.token_hex(8)}.pt2"
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield name
    finally:
        with contextlib.suppress(FileNotFoundError):
            name.unlink()


def _hash_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
