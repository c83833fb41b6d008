"""What a run sets for the whole process: precision, devices, cache, signals."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax
import torch

import torchcall
from torchcall import _bridge
from torchcall._command.parsing import CommandError
from torchcall._compilation_cache import use_compilation_cache


class Terminated(KeyboardInterrupt):
    """SIGTERM."""

    status = 143


@contextmanager
def signals_stop_calls() -> Iterator[None]:
    """Ctrl-C and SIGTERM end a jitted loop at its next call of the model, on every device.

    Python runs their handlers when the main thread is back from the loop, which may take minutes.
    So a second thread reads the signals and makes calls fail.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    except ValueError:  # not the main thread
        os.close(reader)
        os.close(writer)
        yield
        return

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                _bridge.stop_calls(True)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)
        _bridge.stop_calls(False)


@contextmanager
def process_settings(options: argparse.Namespace) -> Iterator[None]:
    """Precision, devices, cache and signals of a run; restored afterwards."""
    use_compilation_cache()
    if len(jax.devices()) < options.devices:
        raise CommandError(
            f"--devices: expected at most {len(jax.devices())}, the number of devices, got "
            f"{options.devices}"
        )

    signals = 0

    # The second one does not disturb what is saved. The third ends the process: the exception of
    # the first is lost if code of torch's compiler catches it.
    def terminate(*_: Any) -> None:
        nonlocal signals
        signals += 1
        if signals == 1:
            raise Terminated("stopped by SIGTERM")
        if signals > 2:
            os._exit(Terminated.status)

    old = signal.getsignal(signal.SIGTERM)
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, terminate)
    double = options.dtype == "float64"
    budget = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with (
            signals_stop_calls(),
            warnings.catch_warnings(),
            jax.enable_x64(double),
            jax.numpy_dtype_promotion("standard"),
        ):
            # jax-md asks for sums in double precision, where they exist.
            warnings.filterwarnings("ignore", "Explicitly requested dtype")
            warnings.filterwarnings("ignore", "`torch.jit")
            yield
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, old)
        torchcall.set_num_threads(budget)
        torch.use_deterministic_algorithms(deterministic)
        sys.stdout.flush()
