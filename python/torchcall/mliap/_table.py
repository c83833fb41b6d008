"""Values by system, in the smallest form: a column of keys and a column of data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import jax

Key = TypeVar("Key", covariant=True)
Data = TypeVar("Data", covariant=True)


class SystemId(int):
    """Number of a system."""


@partial(jax.tree_util.register_dataclass, data_fields=["data"], meta_fields=["keys"])
@dataclass(frozen=True)
class Table(Generic[Key, Data]):
    """`data[k]` belongs to `keys[k]`.

    Attributes:
        keys: unique, static.
        data: pytree of arrays whose first axis is that of the keys.
    """

    keys: tuple[Key, ...]
    data: Data

    @classmethod
    def arange(cls, data: Any, *, label: Any = int) -> Table[Any, Any]:
        """The table with keys `label(0), label(1), …`."""
        return cls(tuple(map(label, range(jax.tree.leaves(data)[0].shape[0]))), data)

    @property
    def size(self) -> int:
        """Number of keys."""
        return len(self.keys)

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[Key, Any]]:
        for k, key in enumerate(self.keys):
            yield key, jax.tree.map(lambda leaf, k=k: leaf[k], self.data)
