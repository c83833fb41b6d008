"""Digests of a model's code and weights, which identify it in other processes."""

import hashlib
import io
import re
import zipfile
from pathlib import Path

_CHUNK = 1 << 20
# These entries differ between files of the same model.
_NOT_CONTENT = (".debug_pkl", ".data/serialization_id")
# Distinguishes TorchScript types of the same name; depends on what the process scripted earlier.
_MANGLE = re.compile(rb"___torch_mangle_\d+\.?")


class ChangedFileError(ValueError):
    """A file changed while it was loaded."""


class FileContent:
    """The digest of a model file, and a check that the file has not changed since.

    Attributes:
        digest: equal for equal files, whatever their names.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._state()
        with zipfile.ZipFile(path) as archive:
            self.digest = _digest_of(archive)

    def require_unchanged(self) -> None:
        """Raises ChangedFileError if the file has changed since its digest was computed."""
        if self._state() != self._before:
            raise ChangedFileError(
                "expected a file that does not change, got one that changed while it was loaded; "
                "load it again"
            )

    def _state(self) -> tuple[int, int, int]:
        state = self._path.stat()
        return state.st_ino, state.st_size, state.st_mtime_ns


def archive_digest(archive: bytes) -> str:
    """Digest of a TorchScript archive that this process wrote."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        root = opened.read(_name_of(opened, "data.pkl"))
        marks = list(dict.fromkeys(_MANGLE.findall(root)))
        return _digest_of(opened, {mark: b"mangle_%d." % i for i, mark in enumerate(marks)})


def _name_of(archive: zipfile.ZipFile, entry: str) -> str:
    return next(name for name in archive.namelist() if name.partition("/")[2] == entry)


def _digest_of(archive: zipfile.ZipFile, renamed: dict[bytes, bytes] | None = None) -> str:
    """Digest of all entries: names, without the archive's one folder, and bytes; sorted."""

    def plain(text: bytes) -> bytes:
        for mark, name in (renamed or {}).items():
            stem = mark.rstrip(b".")
            text = re.sub(re.escape(stem) + rb"(?!\d)\.?", name, text)
        return text

    rows = []
    for entry in archive.infolist():
        name = entry.filename.partition("/")[2]
        if name.endswith(_NOT_CONTENT):
            continue
        digest = hashlib.sha256()
        if renamed and name.endswith((".pkl", ".py")):
            digest.update(plain(archive.read(entry)))
        else:
            with archive.open(entry) as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
        rows.append((plain(name.encode()), digest.digest()))
    return hashlib.sha256(repr(sorted(rows)).encode()).hexdigest()
