"""Ctrl-C and the end of the process while calls run; see csrc/xla/interrupt.h."""

import atexit
import sys
import threading
from typing import Any

from torchcall import _bridge

_TOOL = 4  # of sys.monitoring; the numbers below are for debuggers, coverage and profilers
_ENDS = "got one that is shutting down"


def install() -> None:
    """Makes Ctrl-C end programs that call models, and the process wait for calls when it exits.

    JAX is imported already, so its own functions for the exit run later.
    """
    atexit.register(_finish)
    if threading.current_thread() is threading.main_thread():
        _bridge.watch_interrupts(_raise_later)


def _finish() -> None:
    shown = threading.excepthook

    def show(args: Any) -> None:
        # Daemon threads end without a message, as they do elsewhere in Python.
        if _ENDS not in str(args.exc_value):
            shown(args)

    threading.excepthook = show
    _bridge.finish_calls()


def _raise_later(exception: BaseException | None) -> None:
    """Replaces the next exception on the main thread. For Python 3.12 and later.

    Args:
        exception: what is raised there, or None: what the handlers of pending signals raise.
    """
    monitoring: Any = sys.monitoring  # pyright: ignore[reportAttributeAccessIssue]
    if monitoring.get_tool(_TOOL) is not None:
        return
    main = threading.main_thread().ident

    def replace(*_: object) -> None:
        # Python calls the handlers of pending signals here, because this is Python code.
        if threading.get_ident() != main:
            return
        monitoring.set_events(_TOOL, 0)
        monitoring.free_tool_id(_TOOL)
        if exception is not None:
            raise exception

    monitoring.use_tool_id(_TOOL, "torchcall")
    monitoring.register_callback(_TOOL, monitoring.events.RAISE, replace)
    monitoring.set_events(_TOOL, monitoring.events.RAISE)
