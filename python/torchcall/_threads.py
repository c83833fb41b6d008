"""The one budget of CPU threads that torch may use inside a call."""

import torch

from torchcall import _bridge


def set_num_threads(threads: int) -> None:
    """Sets how many threads torch uses inside one call, on every thread that XLA calls it from.

    torch keeps this number per calling thread, and XLA calls models from threads of its own, so
    `torch.set_num_threads` alone reaches only some of them; this reaches all. Where several calls
    run at once (several devices, several Python threads), set it to cores / calls: each call has a
    team of its own, and more threads than cores cost up to a factor of ten. The default is torch's
    own, all cores (or `OMP_NUM_THREADS`).

    Args:
        threads: at least 1.

    Raises:
        ValueError: if it is not an int ≥ 1.
    """
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"torchcall: set_num_threads: expected an int ≥ 1, got {threads!r}")
    torch.set_num_threads(threads)
    _bridge.set_num_threads(threads)
