"""A progress bar for a jitted loop: a thread polls the model's call counter."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torchcall.demo._system import DemoError, require


@contextmanager
def progress(total: int, count: Callable[[], int], label: str) -> Iterator[None]:
    """Shows the progress of `count()` while the body runs, one jitted loop without callbacks.

    The bar moves because the bridge releases the GIL.

    Args:
        total: The expected increase of the counter.
        count: Reads an increasing counter; its value on entry counts as zero.
        label: Text of the bar.
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

        def poll() -> None:
            while not done.wait(0.1):
                show()

        thread = threading.Thread(target=poll, name="torchcall-demo-progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            show()
