"""Pytrees as the native side reads them: nodes in preorder, tensors by their position."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import jax

Node = tuple[int, int | float | str | None]

# The node kinds of csrc/engine.h.
TENSOR, INT, FLOAT, BOOL, STRING, NONE, LIST, TUPLE, DICT = range(9)


class UnsupportedNodeError(TypeError):
    """A pytree node or a key without a counterpart in TorchScript."""


def items_of(mapping: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """A mapping's items in the order in which JAX flattens them."""
    if isinstance(mapping, OrderedDict):
        return list(mapping.items())
    return sorted(mapping.items())


def check_keys(tree: Any, path: str) -> None:
    """Checks that JAX can sort the keys of every dict.

    Raises:
        ValueError: it cannot, as for keys of two types; the message names the dict.
    """
    if isinstance(tree, dict):
        if not isinstance(tree, OrderedDict):
            try:
                sorted(tree)
            except TypeError:
                raise ValueError(
                    f"{path}: expected a dict with keys of one type, got the keys {list(tree)}"
                ) from None
        for key, value in tree.items():
            check_keys(value, f"{path}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            check_keys(value, f"{path}[{i}]")


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
    """Yields the nodes of `tree` in preorder; `leaf` makes the nodes of its leaves.

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
    prefix: Any, tree: Any, is_leaf: Callable[[Any], bool], what: str, expected: str
) -> list[Any]:
    """Returns the leaf of `prefix` that applies to each leaf of `tree`, in JAX's order.

    Args:
        prefix: a pytree prefix of `tree`.
        tree: None counts as a leaf.
        is_leaf: whether a value is a leaf of `prefix`; None is one.
        what: how errors name `prefix`.
        expected: what the leaves of `prefix` are.

    Raises:
        ValueError: `prefix` is not a prefix of `tree`, or has another kind of leaf.
    """
    # A leaf of its own in place of each None, which JAX takes for an empty subtree.
    full = jax.tree.map(lambda _: 0, tree, is_leaf=lambda x: x is None)
    try:
        leaves = jax.tree.leaves(jax.tree.broadcast(prefix, full, is_leaf=is_leaf), is_leaf=is_leaf)
    except ValueError as error:
        reason = " ".join(str(error).replace("broadcast_prefix prefix_tree", what).split())
        raise ValueError(f"{what}: expected a pytree prefix of the values: {reason}") from error
    for leaf in leaves:
        if not is_leaf(leaf):
            raise ValueError(f"{what}: expected {expected}, got the {type(leaf).__name__} {leaf!r}")
    return leaves
