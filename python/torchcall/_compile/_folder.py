"""Where compiled packages are cached. Imports nothing of torch's compiler, which takes seconds."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$TORCHCALL_CACHE`, or `torchcall/packages` in the user's cache folder of this platform."""
    if chosen := os.environ.get("TORCHCALL_CACHE"):
        return Path(chosen)
    # Imported here: `make gpu-check` sets the variable and runs where platformdirs is missing.
    import platformdirs

    return platformdirs.user_cache_path("torchcall", appauthor=False) / "packages"
