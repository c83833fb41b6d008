"""Files that are written whole or not at all. Imports the standard library only."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path

from torchcall._command.parsing import CommandError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name of a temporary file, which replaces `path` at the end of the block.

    At every moment `path` has its old or its new contents. What a link points to is replaced, not
    the link. A device or pipe is written in place.

    Raises:
        OSError: The file cannot be written; the old one is as it was. Any error of the block.
    """
    target = path.resolve()
    if target.exists() and not target.is_file():
        yield target
        return
    temporary = target.with_name(f".part-{os.getpid()}-{target.name}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_whole(path: Path, data: bytes) -> None:
    """Replaces a file; see `replacing`."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_output(option: str, path: Path, data: bytes) -> None:
    """Writes the file that an option names.

    Raises:
        CommandError: It cannot be written.
    """
    try:
        write_whole(path, data)
    except OSError as error:
        raise CommandError(f"{option} {path}: cannot be written: {error.strerror}", 1) from error


def remove_temporaries(path: Path) -> None:
    """Removes what processes left that were killed in `replacing(path)`."""
    target = path.resolve()
    for temporary in target.parent.glob(f".part-*-{escape(target.name)}"):
        temporary.unlink(missing_ok=True)


def lock(file: int, path: Path) -> None:
    """Locks an open file for this process, until it is closed.

    Raises:
        ValueError: Another process has locked it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"torchcall: {path}: another run is writing this file") from error
    except OSError:
        return  # this file system has no locks


def check_unlocked(path: Path) -> None:
    """Checks that no other process has locked a file.

    Raises:
        ValueError: Another process has.
    """
    if path.is_file():
        file = os.open(path, os.O_RDONLY)
        try:
            lock(file, path)
        finally:
            os.close(file)
