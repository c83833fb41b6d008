"""The number of CPU threads that torch uses inside a call."""

from typing import Any, Literal

import numpy as np
import torch

from torchcall import _bridge

_MAX_THREADS = 4096


def set_num_threads(threads: int) -> None:
    """Sets the number of threads that torch uses inside one call, for all threads of XLA.

    torch stores this number per calling thread, and XLA calls models from its own threads, which
    `torch.set_num_threads` does not reach. If several calls run at once (several devices or Python
    threads), set it to cores / calls: each call has its own thread team, and more threads than
    cores cost up to a factor of ten. The default is torch's: all cores, or `OMP_NUM_THREADS`.

    Args:
        threads: 1 to 4096.

    Raises:
        ValueError: if it is not an int in that range.
    """
    if not _is_number(threads):
        raise ValueError(
            f"torchcall: set_num_threads: expected an int from 1 to {_MAX_THREADS}, got {threads!r}"
        )
    threads = int(threads)
    torch.set_num_threads(threads)
    _bridge.set_num_threads(threads)


def checked_threads(threads: Any) -> int | Literal["auto"] | None:
    """The option `threads` of a wrapper.

    Raises:
        ValueError: it is neither None, "auto" nor an int from 1 to 4096, or this torch has one
            number of threads for the process.
    """
    if threads is None:
        return None
    is_auto = isinstance(threads, str) and threads == "auto"
    if not is_auto and not _is_number(threads):
        raise ValueError(
            f"torchcall: threads: expected None, 'auto' or an int from 1 to {_MAX_THREADS}, "
            f"got {threads!r}"
        )
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        raise ValueError(
            "torchcall: threads: expected None, because this torch does not use OpenMP and has one "
            f"number of threads for the process, got {threads!r}; use torchcall.set_num_threads"
        )
    return "auto" if is_auto else int(threads)


def _is_number(threads: object) -> bool:
    if isinstance(threads, bool) or not isinstance(threads, int | np.integer):
        return False
    return 1 <= int(threads) <= _MAX_THREADS
