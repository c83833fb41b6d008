"""Views read a part of a state; lenses read and replace it."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

State = TypeVar("State")
State_contra = TypeVar("State_contra", contravariant=True)
Part = TypeVar("Part")
Part_co = TypeVar("Part_co", covariant=True)


class View(Protocol[State_contra, Part_co]):
    """A function from a state to a part of it, or to a derived value."""

    def __call__(self, state: State_contra, /) -> Part_co:
        """The part."""
        ...


class Lens(Protocol[State, Part]):
    """A view that can also replace the part, in a new state."""

    def __call__(self, state: State, /) -> Part:
        """Same as `get`."""
        ...

    def get(self, state: State, /) -> Part:
        """The part."""
        ...

    def set(self, state: State, /, value: Part) -> State:
        """A new state with the part replaced by `value`."""
        ...


@dataclasses.dataclass(frozen=True)
class PathLens(Generic[State, Part]):
    """The result of `lens`. Hashable; equal if the paths are equal.

    Attributes:
        path: attribute names and item keys, outermost first; the flag is True for items.
    """

    path: tuple[tuple[Any, bool], ...]

    def __call__(self, state: State, /) -> Part:
        """Same as `get`."""
        return self.get(state)

    def get(self, state: State, /) -> Part:
        """The part."""
        part: Any = state
        for name, is_item in self.path:
            part = part[name] if is_item else getattr(part, name)
        return part

    def set(self, state: State, /, value: Part) -> State:
        """A new state with the part replaced by `value`.

        Raises:
            TypeError: the path leads through anything but dataclasses, named tuples, dicts, tuples
                and lists.
        """
        return _with(state, self.path, value)

    def focus(self, where: Callable[[Any], Any]) -> PathLens[State, Any]:
        """Returns the lens to what `where` reads of this lens's value."""
        return PathLens((*self.path, *_path_of(where)))


def lens(where: Callable[[Any], Part]) -> PathLens[Any, Part]:
    """A lens to the part that `where` reads.

    Args:
        where: a path of attributes and items, e.g. `lambda state: state.outputs["torch"]`; through
            dataclasses, named tuples, dicts, tuples and lists.

    Raises:
        TypeError: `where` is not a path.
    """
    return PathLens(_path_of(where))


class _Recorder:
    """Records attribute and item accesses."""

    def __init__(self, path: tuple[tuple[Any, bool], ...] = ()) -> None:
        self._path = path

    def __getattr__(self, name: str) -> _Recorder:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Recorder((*self._path, (name, False)))

    def __getitem__(self, key: Any) -> _Recorder:
        return _Recorder((*self._path, (key, True)))

    # Without it, iteration would call __getitem__ for ever.
    __iter__ = None


def _path_of(where: Callable[[Any], Any]) -> tuple[tuple[Any, bool], ...]:
    expected = "torchcall: lens: expected a path of attributes and items, e.g. lambda s: s.a.b[0]"
    try:
        found = where(_Recorder())
    except TypeError as error:
        raise TypeError(f"{expected}; {error}") from None
    if not isinstance(found, _Recorder):
        raise TypeError(f"{expected}, got a function that returns {type(found).__name__}")
    return found._path


def _with(whole: Any, path: tuple[tuple[Any, bool], ...], value: Any) -> Any:
    if not path:
        return value
    (name, is_item), rest = path[0], path[1:]
    new = _with(whole[name] if is_item else getattr(whole, name), rest, value)
    if not is_item and dataclasses.is_dataclass(type(whole)):
        return dataclasses.replace(whole, **{name: new})
    if not is_item and hasattr(whole, "_replace"):
        return whole._replace(**{name: new})
    if is_item and type(whole) is tuple:
        place = range(len(whole))[name]
        return (*whole[:place], new, *whole[place + 1 :])
    if is_item and isinstance(whole, dict | list):
        changed = copy.copy(whole)
        changed[name] = new
        return changed
    raise TypeError(
        f"torchcall: lens: {name}: expected a field of a dataclass or named tuple, or an item of a "
        f"dict, tuple or list, got one of {type(whole).__name__}"
    )
