"""Lines on stderr that say what is being done, and for how long."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """One line for each stage, its seconds at the end; nothing at all where `shown` is False.

    Args:
        shown: None: on a terminal, or as the environment variable TORCHCALL_PROGRESS says (0, 1).
    """

    def __init__(self, shown: bool | None = None) -> None:
        self.terminal = bool(getattr(sys.stderr, "isatty", bool)())
        if shown is None:
            wish = os.environ.get("TORCHCALL_PROGRESS", "")
            shown = wish not in ("0", "") or (self.terminal and wish != "0")
        self.shown = shown

    @contextmanager
    def stage(self, text: str) -> Iterator[None]:
        """Shows `text` at once, and how long the body took when it ends; counts on a terminal."""
        if not self.shown:
            yield
            return
        start, done = time.perf_counter(), threading.Event()
        label = f"torchcall: compile: {text:<52}"
        self._write(label)

        def count() -> None:
            while not done.wait(1.0):
                self._write(f"\r{label}{time.perf_counter() - start:6.0f} s")

        watcher = threading.Thread(target=count, name="torchcall-compile-progress", daemon=True)
        if self.terminal:
            watcher.start()
        ending = "failed"
        try:
            yield
            ending = ""
        finally:
            done.set()
            if self.terminal:
                watcher.join()
            seconds = f"{time.perf_counter() - start:6.1f} s"
            self._write(f"{chr(13) + label if self.terminal else ''}{seconds} {ending}".rstrip())
            self._write("\n")

    def note(self, text: str) -> None:
        """Shows a line of its own."""
        if self.shown:
            self._write(f"torchcall: compile: {text}\n")

    @staticmethod
    def _write(text: str) -> None:
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except (OSError, ValueError, AttributeError):  # closed, or none
            pass
