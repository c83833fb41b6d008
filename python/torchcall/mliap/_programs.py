"""Jitted functions that live as long as the object that they belong to."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from types import MethodType
from typing import Any

Program = Callable[..., Any]


class Programs:
    """Jitted functions by owner and key. Owners are compared by identity and referenced weakly.

    JAX's own caches would hold an owner that is a static argument, and so a model's weights.
    """

    def __init__(self) -> None:
        self._of: dict[int, tuple[weakref.ref[Any], dict[Hashable, Program]]] = {}

    def get(
        self, owner: Any, key: Hashable, make: Callable[[Callable[[], Any]], Program]
    ) -> Program:
        """The program of this owner and key.

        Args:
            owner: any object. If it cannot be referenced weakly, each call makes a new program.
            key: what else the program depends on.
            make: makes the program from a function that returns the owner. The program must not
                hold the owner itself, and is not called after the owner's end.
        """
        if isinstance(owner, MethodType):  # a new object at each access
            function = owner.__func__
            return self.get(
                owner.__self__,
                (function, key),
                lambda of: make(lambda: MethodType(function, of())),
            )
        number = id(owner)
        entry = self._of.get(number)
        if entry is None:
            try:
                reference = weakref.ref(owner, lambda _: self._of.pop(number, None))
            except TypeError:
                return make(lambda: owner)
            entry = self._of[number] = reference, {}
        reference, programs = entry
        if key not in programs:
            programs[key] = make(reference)
        return programs[key]
