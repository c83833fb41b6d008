"""Digests of a model's code and weights, which identify it in other processes."""

import hashlib
import io
import re
import zipfile
from pathlib import Path

from torchcall._engines.archive import DAMAGE

_CHUNK = 1 << 20
# These entries differ between files of the same model.
_NOT_CONTENT = (".debug_pkl", ".data/serialization_id")
# Distinguishes TorchScript types of the same name; depends on what the process scripted earlier.
_MANGLE = re.compile(rb"___torch_mangle_\d+\.?")


class ChangedFileError(ValueError):
    """A file changed while it was loaded."""


class FileContent:
    """Detects changes of a model file, and computes its digest.

    Args:
        path: the file. Its state is recorded now, so this precedes everything that reads the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._before = self._state()
        self._digest: str | None = None

    def require_unchanged(self) -> None:
        """Raises ChangedFileError if the file has changed."""
        if not self._is_unchanged():
            raise ChangedFileError(
                "expected a file that does not change, got one that changed while it was loaded; "
                "load it again"
            )

    def digest(self) -> str:
        """Equal for equal files, whatever their names. Empty if the file has changed since.

        Computed by the first call: this takes as long as loading the file.
        """
        if self._digest is None:
            self._digest = self._computed()
        return self._digest

    def _computed(self) -> str:
        if not self._is_unchanged():
            return ""
        try:
            with zipfile.ZipFile(self._path) as archive:
                digest = _digest_of(archive)
        except DAMAGE:
            return ""
        return digest if self._is_unchanged() else ""

    def _is_unchanged(self) -> bool:
        return self._before is not None and self._state() == self._before

    def _state(self) -> tuple[int, int, int] | None:
        try:
            state = self._path.stat()
        except (OSError, ValueError):  # a null character in the path
            return None
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
