"""Progress on stderr: one line for each stage, with its time."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Prints one line for each stage, which ends in its time in seconds.

    Args:
        shown: whether to print. None: as the environment variable TORCHCALL_PROGRESS says (0 or 1);
            without it, if stderr is a terminal.
    """

    def __init__(self, shown: bool | None = None) -> None:
        self.terminal = bool(getattr(sys.stderr, "isatty", bool)())
        if shown is None:
            setting = os.environ.get("TORCHCALL_PROGRESS", "")
            shown = setting not in ("0", "") or (self.terminal and setting != "0")
        self.shown = shown

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Shows `text`, and the time of the body at its end; on a terminal also while it runs."""
        if not self.shown:
            yield
            return
        start, done = time.perf_counter(), threading.Event()
        label = f"torchcall: compile: {text:<52}"
        self._write(label)

        def count() -> None:
            while not done.wait(1.0):
                self._write(f"\r{label}{time.perf_counter() - start:6.0f} s")

        counter = threading.Thread(target=count, name="torchcall-compile-progress", daemon=True)
        if self.terminal:
            counter.start()
        ending = "failed"
        try:
            yield
            ending = ""
        finally:
            done.set()
            if self.terminal:
                counter.join()
            seconds = f"{time.perf_counter() - start:6.1f} s"
            self._write(f"{chr(13) + label if self.terminal else ''}{seconds} {ending}".rstrip())
            self._write("\n")

    def note(self, text: str) -> None:
        """Prints one line."""
        if self.shown:
            self._write(f"torchcall: compile: {text}\n")

    @staticmethod
    def _write(text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # stderr is closed or None
            pass
