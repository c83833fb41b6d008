"""Model files, looked at before torch loads them: nothing is unpickled by accident."""

import zipfile
import zlib
from pathlib import Path


def is_package(path: Path) -> bool:
    """Whether a file is an AOTInductor package, as far as its table of contents or name tells."""
    try:
        if not path.is_file():  # opening a pipe would wait for whoever writes to it
            return False
        with zipfile.ZipFile(path) as archive:
            return any("aotinductor" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError, EOFError):
        return path.suffix == ".pt2"


def check_archive(path: Path) -> None:
    """Makes sure that a file is a whole TorchScript archive.

    Raises:
        FileNotFoundError, IsADirectoryError, OSError: it cannot be read.
        PickledModelError: it was made by `torch.save`.
        ValueError: it is of another kind, or damaged.
    """

    def refuse(got: str, error: type[Exception] = ValueError) -> Exception:
        return error(f"torchcall: {path}: expected a TorchScript archive, got {got}")

    try:
        path.stat()
    except FileNotFoundError as error:
        raise refuse("no such file", FileNotFoundError) from error
    except OSError as error:
        raise refuse(f"a path that cannot be read: {error.strerror}", type(error)) from error
    if path.is_dir():
        raise refuse("a directory", IsADirectoryError)
    if not path.is_file():
        raise refuse("something that is no regular file")
    if path.stat().st_size == 0:
        raise refuse("an empty file")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(1) == b"\x80":
                raise _pickled(path)
        raise refuse("a file that is no zip archive; it may be damaged or of another kind")
    try:
        with zipfile.ZipFile(path) as archive:
            # An archive keeps everything under one folder of any name.
            entries = {name.partition("/")[2] for name in archive.namelist()}
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, ValueError, NotImplementedError, EOFError) as error:
        raise refuse(f"a damaged file: {error}") from error
    if damaged is not None:
        raise refuse(f"a damaged file: the checksum of its entry {damaged} is wrong")
    if "constants.pkl" in entries:
        return
    if any("aotinductor" in entry for entry in entries):
        raise refuse("an AOTInductor package (.pt2)")
    if "data.pkl" in entries:
        raise _pickled(path)
    raise refuse("a zip archive of another kind")


class PickledModelError(ValueError):
    """A pickled model was refused."""


def _pickled(path: Path) -> PickledModelError:
    return PickledModelError(
        f"torchcall: {path}: expected a TorchScript archive, got a pickle (made by torch.save). "
        "Unpickling runs whatever code the file names, so torchcall does not do it: save the model "
        "with torch.jit.script(model).save(path), or, if you trust the file, pass allow_pickle=True"
    )
