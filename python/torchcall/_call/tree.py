"""Pytrees as the native side reads them: nodes in preorder, tensors by their position."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax

Node = tuple[int, int | float | str | None]

# The node kinds of csrc/engine.h.
TENSOR, INT, FLOAT, BOOL, STRING, NONE, LIST, TUPLE, DICT = range(9)


class UnsupportedNodeError(TypeError):
    """A pytree node or a key that TorchScript has no counterpart for."""


def items_of(mapping: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """A mapping's items in the order in which JAX flattens them."""
    if isinstance(mapping, OrderedDict):
        return list(mapping.items())
    return sorted(mapping.items())


def scalar_node(value: object) -> Node:
    """The node of a static Python value."""
    match value:
        case None:
            return NONE, None
        case bool():
            return BOOL, int(value)
        case int():
            if not -(2**63) <= value < 2**63:
                raise UnsupportedNodeError(f"expected an int of 64 bits, got {value}")
            return INT, value
        case float():
            return FLOAT, value
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise UnsupportedNodeError(f"expected text that is UTF-8, got {value!r}") from error
            return STRING, value
    raise UnsupportedNodeError(f"got {type(value).__name__}")


def encode(tree: Any, leaf: Callable[[Any], Node], path: str) -> Iterator[Node]:
    """Yields the nodes of `tree` in preorder; `leaf` makes those of its leaves.

    Raises:
        UnsupportedNodeError: at a container that is no dict, list, tuple or named tuple, or at a
            key that is neither str nor int.
    """
    match tree:
        case dict():
            yield DICT, len(tree)
            for key, value in items_of(tree):
                if isinstance(key, bool) or not isinstance(key, str | int):
                    raise UnsupportedNodeError(
                        f"{path}: expected keys of type str or int, got {key!r}"
                    )
                yield scalar_node(key)
                yield from encode(value, leaf, f"{path}[{key!r}]")
        case list() | tuple():
            yield LIST if isinstance(tree, list) else TUPLE, len(tree)
            for i, value in enumerate(tree):
                yield from encode(value, leaf, f"{path}[{i}]")
        case _:
            if tree is not None and not jax.tree_util.all_leaves([tree]):
                raise UnsupportedNodeError(
                    f"{path}: expected a dict, list or (named) tuple, got {type(tree).__name__}"
                )
            yield leaf(tree)


def broadcast_prefix(
    prefix: Any, tree: Any, is_leaf: Callable[[Any], bool], what: str, path: str = ""
) -> list[Any]:
    """The leaf of `prefix` that covers each leaf of `tree`, in JAX's order.

    Raises:
        ValueError: where `prefix` is not a prefix of `tree`.
    """
    if is_leaf(prefix):
        return [prefix] * _count_leaves(tree)
    if isinstance(prefix, dict) and isinstance(tree, dict):
        if set(prefix) != set(tree):
            raise ValueError(
                f"{what}{path}: expected the keys {sorted(tree, key=str)}, "
                f"got {sorted(prefix, key=str)}"
            )
        pairs = [(f"[{key!r}]", prefix[key], value) for key, value in items_of(tree)]
    elif isinstance(prefix, list | tuple) and isinstance(tree, list | tuple):
        if len(prefix) != len(tree):
            raise ValueError(f"{what}{path}: expected {len(tree)} entries, got {len(prefix)}")
        pairs = [(f"[{i}]", p, v) for i, (p, v) in enumerate(zip(prefix, tree, strict=True))]
    else:
        raise ValueError(
            f"{what}{path}: expected a torch.dtype, None, or a pytree prefix of (args, kwargs), "
            f"got {type(prefix).__name__} for {type(tree).__name__}"
        )
    return [
        leaf
        for step, p, value in pairs
        for leaf in broadcast_prefix(p, value, is_leaf, what, path + step)
    ]


def _count_leaves(tree: Any) -> int:
    return jax.tree_util.tree_structure(tree, is_leaf=lambda x: x is None).num_leaves
