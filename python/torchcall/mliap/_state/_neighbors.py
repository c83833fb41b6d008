"""Edges of a state from any callable."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def call_neighborlist(
    neighborlist: Callable[..., Any], particles: Any, systems: Any, cutoffs: Any
) -> Any:
    """Edges from `(particles, systems, cutoffs) → Edges`, or `(particles, systems) → Edges`.

    Raises:
        TypeError: it is not callable.
    """
    if not callable(neighborlist):
        raise TypeError(
            "torchcall: neighborlist: expected a callable (particles, systems, cutoffs) → Edges, "
            f"got {type(neighborlist).__name__}"
        )
    try:
        inspect.signature(neighborlist).bind(particles, systems, cutoffs)
    except TypeError:
        # A list with a fixed cutoff.
        return neighborlist(particles, systems)
    except ValueError:  # it has no signature
        pass
    return neighborlist(particles, systems, cutoffs)
