"""The list's two sequential stages as custom calls on the CPU, without torch.

On other platforms, and in `use_jax`, these stages are gathers and scatters in JAX.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt32

from torchcall import _bridge

_TARGET = "torchcall_neighbors_"
_enabled = True


@contextmanager
def use_jax() -> Iterator[None]:
    """Programs traced in this context contain no custom calls; for tests that compare the two."""
    global _enabled
    _enabled = False
    jax.clear_caches()
    try:
        yield
    finally:
        _enabled = True
        jax.clear_caches()


def on_cpu_or(native: Callable[..., Any], in_jax: Callable[..., Any], *operands: Any) -> Any:
    """`native(*operands)` on a CPU, `in_jax(*operands)` elsewhere."""
    if not _enabled:
        return in_jax(*operands)
    return lax.platform_dependent(*operands, cpu=native, default=in_jax)


def compact(
    words: UInt32[Array, " m"], capacity: int
) -> tuple[Int[Array, " c"], Int[Array, " c"], Int[Array, ""]]:
    """`compact.compact` by a custom call."""
    slots = jax.ShapeDtypeStruct((capacity,), jnp.int32)
    return _call("compact_bits", (slots, slots, jax.ShapeDtypeStruct((), jnp.int32)), words)


def select_close(
    sender: Int[Array, " V"],
    receiver: Int[Array, " V"],
    image: Int[Array, " V"],
    n_pairs: Int[Array, ""],
    wraps: Int[Array, "3 N"],
    positions: Float[Array, "N 3"],
    cell: Float[Array, "B 3 3"],
    batch: Int[Array, " N"],
    *,
    n_edges: int,
    limit: float,
) -> tuple[Int[Array, "2 E"], Float[Array, "E 3"], Int[Array, ""]]:
    """Candidates with `|r|² < limit` except (i, i, 0): `(edge_index, cell_offsets, count)`."""
    results = (
        jax.ShapeDtypeStruct((2, n_edges), jnp.int32),
        jax.ShapeDtypeStruct((n_edges, 3), positions.dtype),
        jax.ShapeDtypeStruct((), jnp.int32),
    )
    operands = (sender, receiver, image, n_pairs, wraps, positions, cell, batch)
    return _call("select_close", results, *operands, limit=limit)


@cache
def _register() -> None:
    for name, handler in _bridge.neighbor_handlers().items():
        jax.ffi.register_ffi_target(_TARGET + name, handler, platform="cpu")


def _call(name: str, results: Any, *operands: Array, **attributes: Any) -> Any:
    _register()
    call = jax.ffi.ffi_call(_TARGET + name, results, vmap_method="expand_dims")
    return call(*operands, **attributes)
