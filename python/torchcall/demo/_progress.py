"""A progress bar for work that never comes back to Python: a thread watches a counter of calls."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchcall.demo._system import DemoError, require


@contextmanager
def progress(total: int, count: Callable[[], int], label: str) -> Iterator[None]:
    """Shows how far `count()` has come while the body runs.

    The body is one jitted loop without callbacks. A bridge that held the GIL throughout would leave
    this thread, and the bar, standing still.

    Args:
        total: How far it will come.
        count: A counter that grows, cheap to read; its value on entry counts as zero.
        label: What is being done.
    """
    try:
        tqdm: Any = require("tqdm", "the progress bar").tqdm
    except DemoError as missing:
        print(f"torchcall: {missing}")
        yield
        return
    start, done = count(), threading.Event()
    with tqdm(total=total, desc=label, unit=" steps", dynamic_ncols=True, mininterval=0.1) as bar:

        def show() -> None:
            bar.n = min(total, count() - start)
            bar.refresh()

        def watch() -> None:
            while not done.wait(0.1):
                show()

        watcher = threading.Thread(target=watch, name="torchcall-demo-progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            done.set()
            watcher.join()
            show()
