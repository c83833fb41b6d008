"""Checks of model files before torch loads them, without unpickling anything."""

import struct
import zipfile
import zlib
from pathlib import Path

_ARCHIVE = "a TorchScript archive"
# What `zipfile` raises on damaged files.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    RuntimeError,
    EOFError,
    OSError,
)


def is_package(path: Path) -> bool:
    """Whether a file is an AOTInductor package, by its table of contents, else by its name."""
    try:
        if not path.is_file():  # opening a pipe would block
            return False
        with zipfile.ZipFile(path) as archive:
            return any("aotinductor" in name for name in archive.namelist())
    except _DAMAGE:
        return path.suffix == ".pt2"


def check_archive(path: Path) -> None:
    """Checks that a file is a complete TorchScript archive.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: it cannot be read.
        PickledModelError: it was made by `torch.save`.
        ValueError: it is of another kind, or damaged.
    """
    entries = checked_entries(path, _ARCHIVE)
    if "constants.pkl" in entries:
        return
    if any("aotinductor" in entry for entry in entries):
        raise refusal(path, _ARCHIVE, "an AOTInductor package (.pt2)")
    if "data.pkl" in entries:
        raise pickled(path, _ARCHIVE)
    raise refusal(path, _ARCHIVE, "a zip archive of another kind")


def checked_entries(path: Path, expected: str) -> dict[str, zipfile.ZipInfo]:
    """A zip archive's entries by their names below its one folder, with verified checksums.

    Args:
        path: of the file.
        expected: what errors say it should be.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: it cannot be read.
        PickledModelError: it is a bare pickle.
        ValueError: it is something else, or damaged.
    """

    def refuse(got: str, error: type[Exception] = ValueError) -> Exception:
        return refusal(path, expected, got, error)

    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise refuse("no such file", FileNotFoundError) from error
    except OSError as error:
        raise refuse(f"a path that cannot be read: {error.strerror}", type(error)) from error
    except ValueError as error:  # a null character
        raise refuse(f"a path that cannot be read: {error}") from error
    if path.is_dir():
        raise refuse("a directory", IsADirectoryError)
    if not path.is_file():
        raise refuse("something that is no regular file")
    if size == 0:
        raise refuse("an empty file")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise refuse(f"a file that cannot be read: {error.strerror}", type(error)) from error
    try:
        entries, damaged = _contents(path)
    except _DAMAGE as error:
        raise refuse(f"a damaged file: {error}") from error
    if entries is None:
        if first == b"\x80":
            raise pickled(path, expected)
        raise refuse("a file that is no zip archive; it may be damaged or of another kind")
    if damaged is not None:
        raise refuse(f"a damaged file: the checksum of its entry {damaged} is wrong")
    return entries


def _contents(path: Path) -> tuple[dict[str, zipfile.ZipInfo] | None, str | None]:
    """The entries, None where this is no zip archive, and the first whose checksum is wrong."""
    if not zipfile.is_zipfile(path):
        return None, None
    with zipfile.ZipFile(path) as archive:
        # Everything is under one folder of any name.
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        return entries, archive.testzip()


def refusal(path: Path, expected: str, got: str, error: type[Exception] = ValueError) -> Exception:
    """The error for a file of another kind."""
    return error(f"torchcall: {path}: expected {expected}, got {got}")


class PickledModelError(ValueError):
    """A pickled model was refused."""


def pickled(path: Path, expected: str) -> Exception:
    """The error for a file that `torch.save` made."""
    return refusal(
        path,
        expected,
        "a pickle (made by torch.save). Unpickling runs whatever code the file names, so torchcall "
        "does not do it: save the model with torch.jit.script(model).save(path), or, if you trust "
        "the file, pass allow_pickle=True",
        PickledModelError,
    )
