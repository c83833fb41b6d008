"""How the process of a command keeps memory between calls of a model."""

import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_SETTINGS = {
    "MALLOC_TRIM_THRESHOLD_": (_TRIM_THRESHOLD, 2**31 - 1),
    "MALLOC_MMAP_THRESHOLD_": (_MMAP_THRESHOLD, 32 * 2**20),  # the largest that glibc accepts
}


def keep_memory() -> None:
    """Lets glibc keep freed memory for the next call of the model.

    By default it returns the memory of a network's tensors to the system in each call and gets it
    again, cleared: a quarter of the time of a MACE of 216 atoms. Variables of the environment have
    precedence. Without glibc, nothing changes.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for variable, (parameter, value) in _SETTINGS.items():
        if mallopt is not None and variable not in os.environ:
            mallopt(parameter, value)
