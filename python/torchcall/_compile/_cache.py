"""The cache of compiled packages. The key is a hash of everything that determines a package."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from torchcall._compile._folder import cache_folder, digest_of
from torchcall._undocumented.of_compiler import pick_vec_isa


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
            if entry.stem.rpartition("-")[2] == digest_of(read):
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
            os.replace(copy, folder / f"{key}-{digest_of(copy)}.pt2")


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new empty `.pt2` file in the folder of `path`, removed at the end unless it was renamed.

    Files that processes left there because they were killed are removed: in the cache's folder all
    of them, elsewhere those for the same `path`.

    Raises:
        OSError: the folder cannot be written.
    """
    stem = path.stem[:40]
    _remove_leftovers(path.parent, None if path.parent == cache_folder() else stem)
    # Not by `tempfile`: only the owner could read its files.
    name, file = _locked(path.parent, stem)
    try:
        yield name
    finally:
        os.close(file)
        with contextlib.suppress(FileNotFoundError):
            name.unlink()


def _locked(folder: Path, stem: str) -> tuple[Path, int]:
    """A new file and its descriptor. The lock on it ends with the process, so shows that it lives.

    torch's compiler and `copyfile` write into the file that exists, which remains locked.
    """
    while True:
        name = folder / f".{stem}-{secrets.token_hex(8)}.pt2"
        file = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file).st_nlink:
            return name, file
        os.close(file)  # another process took it for a leftover before it was locked


def _remove_leftovers(folder: Path, stem: str | None) -> None:
    """Removes temporary files of `temporary_beside` whose process has ended."""
    pattern = re.compile(rf"\.{'.+' if stem is None else re.escape(stem)}-[0-9a-f]{{16}}\.pt2")
    with contextlib.suppress(OSError):
        for name in folder.iterdir():
            if pattern.fullmatch(name.name):
                with contextlib.suppress(OSError):
                    _remove_unlocked(name)


def _remove_unlocked(name: Path) -> None:
    """Raises OSError if a process has the file locked."""
    file = os.open(name, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        name.unlink()
    finally:
        os.close(file)
