"""What a run sets for the whole process: precision, devices, cache, signals."""

from __future__ import annotations

import argparse
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import torch

import torchcall
from torchcall._command.parsing import CommandError
from torchcall._compilation_cache import use_compilation_cache


class Terminated(KeyboardInterrupt):
    """SIGTERM."""


@contextmanager
def process_settings(options: argparse.Namespace) -> Iterator[None]:
    """Precision, devices, cache and signals of a run; restored afterwards."""
    use_compilation_cache()
    if options.devices > 1 and not _started():
        jax.config.update("jax_num_cpu_devices", options.devices)
    if len(jax.devices()) < options.devices:
        raise CommandError(
            f"--devices: expected at most {len(jax.devices())}, the number of devices, got "
            f"{options.devices}"
        )

    def terminate(*_: Any) -> None:
        raise Terminated

    old = signal.getsignal(signal.SIGTERM)
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, terminate)
    double = options.dtype == "float64"
    budget = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with (
            warnings.catch_warnings(),
            jax.enable_x64(double),
            jax.numpy_dtype_promotion("standard"),
        ):
            # jax-md asks for sums in double precision, where they exist.
            warnings.filterwarnings("ignore", "Explicitly requested dtype")
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, old)
        torchcall.set_num_threads(budget)
        torch.use_deterministic_algorithms(deterministic)
        sys.stdout.flush()


def _started() -> bool:
    from jax._src import xla_bridge

    return xla_bridge.backends_are_initialized()
