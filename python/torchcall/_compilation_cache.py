"""JAX's persistent compilation cache, for the programs of the command line."""

import os
import tempfile
from pathlib import Path
from typing import Any

import jax

from torchcall._compile._folder import cache_folder

_SETTINGS = {
    # Most programs of a run compile in less than JAX's default, a second.
    "jax_persistent_cache_min_compile_time_secs": 0.1,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    # Programs that were not used for longest are removed.
    "jax_compilation_cache_max_size": 2**30,
}


def use_compilation_cache() -> Path | None:
    """Makes JAX store compiled programs in the user's cache folder, and find them there.

    The user's own settings win (`jax_compilation_cache_dir` or an environment variable of JAX).
    A program names its model by content, or by the place of a live model in its process; so a
    stored program calls the model of the process that loads it.

    Returns:
        The folder; None if the user has chosen another or the folder cannot be written.
    """
    config: Any = jax.config
    if config.jax_compilation_cache_dir is not None or not config.jax_enable_compilation_cache:
        return None
    try:
        folder = cache_folder("programs")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    for name, value in _SETTINGS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return folder
