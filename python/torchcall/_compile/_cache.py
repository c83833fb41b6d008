"""Packages that were compiled before, by what went into them."""

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


def cache_folder() -> Path:
    """`$TORCHCALL_CACHE`, or `torchcall/packages` in the user's cache folder of this platform."""
    if chosen := os.environ.get("TORCHCALL_CACHE"):
        return Path(chosen)
    # Imported here: `make gpu-check` sets the variable and runs where platformdirs is missing.
    import platformdirs

    return platformdirs.user_cache_path("torchcall", appauthor=False) / "packages"


def key_of(metadata: dict[str, Any], options: dict[str, Any]) -> str:
    """SHA-256 of all that decides what is compiled and written.

    Args:
        metadata: with the hash of the graph and its weights, torch's version, device and capacity.
        options: the compiler's.
    """
    isa = str(pick_vec_isa())
    if metadata["device"] == "cuda":
        isa += f" {torch.cuda.get_device_capability()} {torch.version.cuda}"
    text = json.dumps([metadata, options, isa, os.uname().machine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def find(key: str) -> Path | None:
    """The entry for a key, if there is one whose bytes are those that were written.

    An entry's name ends in the hash of its bytes. Entries that are damaged are removed.
    """
    with contextlib.suppress(OSError):
        for entry in sorted(cache_folder().glob(f"{key}-*.pt2")):
            if entry.stem.rpartition("-")[2] == _hash_of(entry):
                return entry
            entry.unlink()
    return None


def keep(key: str, package: Path) -> None:
    """Puts a copy of a package into the cache; a cache that cannot be written is left alone.

    Written under a name of its own and renamed at the end, so readers and other writers never
    see half a file.
    """
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_beside(folder / f"{key}.pt2") as copy:
            shutil.copyfile(package, copy)
            os.replace(copy, folder / f"{key}-{_hash_of(copy)}.pt2")


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new empty file in the folder of `path`, whose name ends in `.pt2`; removed if still there.

    Raises:
        OSError: the folder cannot be written.
    """
    # Not by tempfile, whose files only their owner can read.
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
