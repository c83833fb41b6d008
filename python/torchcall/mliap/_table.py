"""Values by system or by particle: a column of keys, a column of data, and references to keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

Key = TypeVar("Key", covariant=True)
Data = TypeVar("Data", covariant=True)


class SystemId(int):
    """Number of a system."""


class ParticleId(int):
    """Number of a particle."""


@partial(jax.tree_util.register_dataclass, data_fields=["indices"], meta_fields=["keys"])
@dataclass(frozen=True)
class Index(Generic[Key]):
    """References to keys: entry e refers to `keys[indices[e]]`, or is padding if out of range.

    Attributes:
        keys: unique, static.
        indices: integers of any shape; those outside `[0, len(keys))` mark padding.
    """

    keys: tuple[Key, ...]
    indices: Int[Array, ...]

    @classmethod
    def integer(
        cls, ids: Any, *, n: int | None = None, label: Callable[[int], Any] = int
    ) -> Index[Any]:
        """References to `label(0), …, label(n − 1)` by number.

        Args:
            ids: integers of any shape.
            n: number of keys; one more than the largest of the ids if None, outside `jit` only.
            label: makes a key, e.g. `SystemId`.

        Raises:
            TypeError: the ids are not integers.
        """
        ids = jnp.asarray(ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"torchcall: Index: expected integers, got {ids.dtype}")
        if n is None:
            n = int(np.max(np.asarray(ids), initial=-1)) + 1
        return cls(tuple(map(label, range(n))), ids)

    @classmethod
    def new(cls, values: Sequence[Any]) -> Index[Any]:
        """References to the sorted unique entries of the values."""
        array = np.asarray(values, object)
        keys, indices = np.unique(array, return_inverse=True)
        return cls(tuple(keys.tolist()), jnp.asarray(indices.reshape(array.shape), jnp.int32))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of `indices`."""
        return self.indices.shape

    @property
    def num_labels(self) -> int:
        """Number of keys."""
        return len(self.keys)

    @property
    def cls(self) -> type[Any]:
        """Type of the keys."""
        return _class_of(self.keys)

    @property
    def valid_mask(self) -> Bool[Array, ...]:
        """True where an entry refers to a key."""
        return (self.indices >= 0) & (self.indices < len(self.keys))

    def indices_in(self, keys: tuple[Any, ...]) -> Int[Array, ...]:
        """Position of each entry's key in `keys`, `len(keys)` for padding.

        Raises:
            ValueError: a key of this index is not among them.
        """
        return rows_of(self, keys, "Index")

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: Any) -> Index[Key]:
        return replace(self, indices=self.indices[item])


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

    @property
    def cls(self) -> type[Any]:
        """Type of the keys."""
        return _class_of(self.keys)

    @property
    def index(self) -> Index[Key]:
        """References to every key, in order."""
        return Index(self.keys, jnp.arange(len(self.keys), dtype=jnp.int32))

    def set_data(self, data: Any) -> Table[Key, Any]:
        """A table with these data and the same keys."""
        return replace(self, data=data)

    def map_data(self, function: Callable[[Any], Any]) -> Table[Key, Any]:
        """A table with `function(data)` and the same keys."""
        return replace(self, data=function(self.data))

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[Key, Any]]:
        for k, key in enumerate(self.keys):
            yield key, jax.tree.map(lambda leaf, k=k: leaf[k], self.data)

    def __getitem__(self, index: Index[Any]) -> Any:
        """The rows that an index refers to; padding gives NaN, 0 or False.

        Raises:
            ValueError: the index has a key that this table lacks.
        """
        rows = rows_of(index, self.keys, "Table")

        def take(leaf: Array) -> Array:
            fill = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else 0
            return leaf.at[rows].get(mode="fill", fill_value=fill)

        return jax.tree.map(take, self.data)


def rows_of(index: Any, keys: tuple[Any, ...], name: str) -> Int[Array, ...]:
    """Position in `keys` of the key of each entry of an index, `len(keys)` for padding.

    Args:
        index: an object with `keys` and `indices`, or an integer array of positions.
        keys: the keys to search.
        name: name of the index in error texts.

    Raises:
        ValueError: the index has a key that is not among `keys`.
        TypeError: its entries are not integers.
    """
    own = getattr(index, "keys", None)
    places = jnp.asarray(index if own is None else index.indices)
    if not jnp.issubdtype(places.dtype, jnp.integer):
        raise TypeError(f"torchcall: {name}: expected integers, got {places.dtype}")
    limit = len(keys) if own is None else len(own)
    known = (places >= 0) & (places < limit)
    if own is None or own is keys or own == keys:
        return jnp.where(known, places, len(keys))
    at = {key: k for k, key in enumerate(keys)}
    missing = [key for key in own if key not in at]
    if missing:
        raise ValueError(f"torchcall: {name}: expected keys among {_some(keys)}, got {missing[0]}")
    table = jnp.asarray(np.array([*(at[key] for key in own), len(keys)], places.dtype))
    return table[jnp.where(known, places, limit)]


def _class_of(keys: tuple[Any, ...]) -> type[Any]:
    if not keys:
        raise ValueError(
            "torchcall: cls: expected at least one key, which determines the type, got none"
        )
    return type(keys[0])


def _some(keys: tuple[Any, ...]) -> str:
    return str(keys) if len(keys) <= 6 else f"({keys[0]}, …, {keys[-1]})"
