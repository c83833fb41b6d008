"""Checks of model files before torch loads them, without unpickling anything."""

import struct
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

TORCHSCRIPT = "a TorchScript archive"
PACKAGE = "an AOTInductor package (.pt2)"
_PICKLE = (
    "a pickle (made by torch.save). Unpickling runs whatever code the file names, so torchcall "
    "does not do it: save the model with torch.jit.script(model).save(path), or, if you trust "
    "the file, pass allow_pickle=True"
)

# What `zipfile` raises on damaged files.
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    RuntimeError,
    EOFError,
    OSError,
)


def is_package(path: Path) -> bool:
    """Whether a file is an AOTInductor package: by its entries, or by its name if it is damaged."""
    try:
        if not path.is_file():  # opening a pipe would block
            return False
        with zipfile.ZipFile(path) as archive:
            return any("aotinductor" in name for name in archive.namelist())
    except DAMAGE:
        return path.suffix == ".pt2"


def check_archive(path: Path, expected: str) -> dict[str, zipfile.ZipInfo]:
    """Checks that a file is a complete archive of the expected kind; verifies all checksums.

    Args:
        path: of the file.
        expected: `TORCHSCRIPT` or `PACKAGE`.

    Returns:
        The entries by their names below the archive's one folder.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: the file cannot be read.
        PickledModelError: `torch.save` made it.
        ValueError: it is of another kind, or damaged.
    """

    def refuse(got: str, error: type[Exception] = ValueError) -> Exception:
        return refusal(path, expected, got, PickledModelError if got is _PICKLE else error)

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
        raise refuse("something that is not a regular file")
    if size == 0:
        raise refuse("an empty file")
    try:
        with path.open("rb") as file:
            first = file.read(1)
    except OSError as error:
        raise refuse(f"a file that cannot be read: {error.strerror}", type(error)) from error
    try:
        entries, damaged = _contents(path)
    except DAMAGE as error:
        raise refuse(f"a damaged file: {error}") from error
    if entries is None:
        if first == b"\x80":  # the first byte of every pickle
            raise refuse(_PICKLE)
        raise refuse("a file that is no zip archive; it may be damaged or of another kind")
    if damaged is not None:
        raise refuse(f"a damaged file: the checksum of its entry {damaged} is wrong")
    if (kind := _kind(entries)) != expected:
        raise refuse(kind)
    return entries


def check_checksums(path: Path, expected: str) -> None:
    """Checks that no entry of a zip archive is damaged: torch reads the others as if all were well.

    Raises:
        ValueError: the checksum of an entry is wrong.
    """
    try:
        _, damaged = _contents(path)
    except DAMAGE:  # reported where the file is loaded
        return
    if damaged is not None:
        raise refusal(
            path, expected, f"a damaged file: the checksum of its entry {damaged} is wrong"
        )


def _contents(path: Path) -> tuple[dict[str, zipfile.ZipInfo] | None, str | None]:
    """The entries, None if this is no zip archive, and the first one with a wrong checksum."""
    if not zipfile.is_zipfile(path):
        return None, None
    with zipfile.ZipFile(path) as archive:
        # All entries are in one folder; its name varies.
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        return entries, archive.testzip()


def _kind(entries: Collection[str]) -> str:
    compiled = [name for name in entries if name.startswith("data/aotinductor/")]
    if any(name.endswith(".so") for name in compiled):
        return PACKAGE
    if compiled:
        return (
            "an AOTInductor package without a compiled library (.so), made with package_cpp_only "
            "or by something else"
        )
    if "constants.pkl" in entries:
        return TORCHSCRIPT
    if "data.pkl" in entries:
        return _PICKLE
    if any(name.endswith(("models/model.json", "exported_program.json")) for name in entries):
        return (
            "an exported program that is not compiled (made by torch.export.save); "
            "torchcall.compile makes a package from the module itself"
        )
    return "a zip archive of another kind"


def refusal(path: Path, expected: str, got: str, error: type[Exception] = ValueError) -> Exception:
    """The error for a file that is not what was expected."""
    return error(f"torchcall: {path}: expected {expected}, got {got}")


class PickledModelError(ValueError):
    """A pickled model was refused."""
