"""The number of CPU threads that torch uses inside a call."""

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
    is_int = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
    if not is_int or not 1 <= threads <= _MAX_THREADS:
        raise ValueError(
            f"torchcall: set_num_threads: expected an int from 1 to {_MAX_THREADS}, got {threads!r}"
        )
    threads = int(threads)
    torch.set_num_threads(threads)
    _bridge.set_num_threads(threads)
