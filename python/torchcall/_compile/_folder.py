"""Where compiled code is cached. Imports nothing of torch's compiler, which takes seconds."""

import hashlib
import os
from pathlib import Path
from typing import Literal


def cache_folder(content: Literal["packages", "programs"] = "packages") -> Path:
    """`torchcall/packages` or `torchcall/programs` in the user's cache folder of this platform.

    If `TORCHCALL_CACHE` is set: that folder for packages, and its `programs`.
    """
    if chosen := os.environ.get("TORCHCALL_CACHE"):
        return Path(chosen) / content if content == "programs" else Path(chosen)
    # Imported here: `make gpu-check` sets the variable and runs where platformdirs is missing.
    import platformdirs

    return platformdirs.user_cache_path("torchcall", appauthor=False) / content


def digest_of(path: Path) -> str:
    """SHA-256 of a file. The name of a package in the cache ends in it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
