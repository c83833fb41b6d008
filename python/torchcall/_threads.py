"""The one budget of CPU threads that torch may use inside a call."""

import numpy as np
import torch

from torchcall import _bridge

_MOST = 4096


def set_num_threads(threads: int) -> None:
    """Sets how many threads torch uses inside one call, on every thread that XLA calls it from.

    torch keeps this number per calling thread, and XLA calls models from threads of its own, so
    `torch.set_num_threads` alone reaches only some of them; this reaches all. Where several calls
    run at once (several devices, several Python threads), set it to cores / calls: each call has a
    team of its own, and more threads than cores cost up to a factor of ten. The default is torch's
    own, all cores (or `OMP_NUM_THREADS`).

    Args:
        threads: 1 to 4096.

    Raises:
        ValueError: if it is not an int in that range.
    """
    is_int = isinstance(threads, int | np.integer) and not isinstance(threads, bool)
    if not is_int or not 1 <= threads <= _MOST:
        raise ValueError(
            f"torchcall: set_num_threads: expected an int from 1 to {_MOST}, got {threads!r}"
        )
    threads = int(threads)
    torch.set_num_threads(threads)
    _bridge.set_num_threads(threads)
