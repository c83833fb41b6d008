"""Stable compaction of bit masks: indices of the set bits, in order, in a fixed capacity.

XLA's CPU backend scatters on one thread, and lowers a long cumulative sum to a tree of window
reductions. Both cost more than the distances that are compacted. Here a mask is packed into 32-bit
words, the words' population counts are summed, and every output slot finds its own set bit. This
needs gathers and arithmetic only, which run on all cores and on GPUs.
"""

from __future__ import annotations

import math
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, UInt32

BITS = 32
_BLOCK = 32
_BELOW = np.array([(1 << b) - 1 for b in range(BITS)], np.uint32)
_UP_TO = np.array([(2 << b) - 1 for b in range(BITS)], np.uint32)


@overload
def materialize(arrays: Array) -> Array: ...
@overload
def materialize(arrays: list[Array]) -> list[Array]: ...
def materialize(arrays: Any) -> Any:
    """Returns the arrays unchanged; writes them to memory once, so that no reader recomputes them.

    XLA's CPU backend removes optimization barriers before it fuses, and then computes a value again
    in each fusion that reads it. It never fuses a scatter, so a scatter that writes nothing
    prevents this. Other backends respect barriers.

    Args:
        arrays: an array, or a list of arrays of one shape and dtype.

    Returns:
        The same arrays.
    """

    stacked = arrays if isinstance(arrays, jax.Array) else jnp.stack(arrays)

    def write_nothing(x: Array) -> Array:
        flat = x.reshape(-1)
        nowhere = jnp.full(
            2, flat.shape[0], jnp.int32
        )  # a single index would become a slice update, which is fused
        return flat.at[nowhere].set(jnp.zeros((), x.dtype), mode="drop").reshape(x.shape)

    result = lax.platform_dependent(stacked, cpu=write_nothing, default=lax.optimization_barrier)
    return result if isinstance(arrays, jax.Array) else list(result)


def inclusive_sum(x: Int[Array, " n"]) -> Int[Array, " n"]:
    """``y[k] = sum(x[: k + 1])``, if any 32 adjacent entries of ``x`` sum to less than 2**24.

    Sums within blocks of 32 are products with a triangular matrix, exact in float32 under that
    bound. This is several times faster than ``jnp.cumsum`` on XLA's CPU backend, and compiles fast.

    Args:
        x: counts, int32.

    Returns:
        Running sums, int32.
    """
    n = x.shape[0]
    if n <= 8 * _BLOCK:
        return jnp.cumsum(x, dtype=jnp.int32)
    blocks = jnp.pad(x, (0, -n % _BLOCK)).reshape(-1, _BLOCK).astype(jnp.float32)
    triangle = jnp.triu(jnp.ones((_BLOCK, _BLOCK), jnp.float32))
    inside = jnp.dot(blocks, triangle, precision=lax.Precision.HIGHEST).astype(jnp.int32)
    totals = inside[:, -1]
    before = materialize(jnp.cumsum(totals, dtype=jnp.int32) - totals)
    return (inside + before[:, None]).reshape(-1)[:n]


def pack_bits(mask: Bool[Array, "*rows k"]) -> UInt32[Array, "*rows words"]:
    """``word[w] = sum_b mask[32 w + b] << b``, the last word padded with zeros.

    Args:
        mask: bits along the last axis.

    Returns:
        Words, uint32, ``ceil(k / 32)`` of them along the last axis.
    """
    k = mask.shape[-1]
    n_words = math.ceil(k / BITS)
    words = []
    for w in range(n_words):
        part = mask[..., w * BITS : min(k, (w + 1) * BITS)]
        shifts = jnp.arange(part.shape[-1], dtype=jnp.uint32)
        words.append(jnp.sum(part.astype(jnp.uint32) << shifts, axis=-1, dtype=jnp.uint32))
    return jnp.stack(words, axis=-1)


def _popcount(words: UInt32[Array, "*n"]) -> Int[Array, "*n"]:
    return lax.population_count(words).astype(jnp.int32)


def _ranks_below(words: UInt32[Array, " m"], *, inclusive: bool = False) -> Int[Array, " n"]:
    """Number of set bits before each of the ``32 m`` bits (including it if ``inclusive``)."""
    counts = _popcount(words)
    before = materialize(inclusive_sum(counts) - counts)
    below = _UP_TO if inclusive else _BELOW
    return (before[:, None] + _popcount(words[:, None] & below)).reshape(-1)


def _select_bit(word: UInt32[Array, " n"], rank: Int[Array, " n"]) -> Int[Array, " n"]:
    """Position of the ``rank``-th set bit (counted from 0) of each word."""
    position = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        low = word & jnp.uint32((1 << width) - 1)
        count = _popcount(low)
        above = rank >= count
        rank = jnp.where(above, rank - count, rank)
        word = jnp.where(above, word >> jnp.uint32(width), word)
        position = jnp.where(above, position + width, position)
    return position


def compact(
    words: UInt32[Array, " m"], capacity: int
) -> tuple[Int[Array, " c"], Int[Array, " c"], Int[Array, ""]]:
    """The set bits of ``words`` in order: slot ``e`` refers to the ``e``-th one.

    Args:
        words: mask, 32 bits per word, lowest bit first.
        capacity: number of output slots, static.

    Returns:
        ``(word, bit, count)``, int32: for each slot, the index of the word and of the bit in it
            (from slot ``count`` on, in range but arbitrary); and the number of set bits, which may
            exceed ``capacity``.
    """
    words = materialize(words)
    counts = _popcount(words)
    ends = inclusive_sum(counts)
    starts = materialize(ends - counts)
    # Words with a set bit, in order. Each starts at a different slot, which gets one mark bit. The
    # number of marks up to a slot is the rank of the word that fills it.
    used = (counts > 0) & (starts < capacity)
    rank_of_word = _ranks_below(mask_to_words(used))[: words.shape[0]]
    ids = jnp.zeros(capacity + 1, jnp.int32)
    ids = ids.at[jnp.where(used, rank_of_word, capacity)].set(
        jnp.arange(words.shape[0], dtype=jnp.int32), mode="promise_in_bounds"
    )
    n_blocks = math.ceil(capacity / BITS)
    marks = jnp.zeros(n_blocks, jnp.uint32)
    marks = marks.at[jnp.minimum(starts >> 5, n_blocks - 1)].add(
        jnp.where(used, jnp.uint32(1) << (starts & 31).astype(jnp.uint32), 0),
        mode="promise_in_bounds",
    )
    rank = _ranks_below(marks, inclusive=True)[:capacity] - 1
    word = ids.at[jnp.maximum(rank, 0)].get(mode="promise_in_bounds")
    # Without it, XLA would recompute the gathered array for every reader.
    word = materialize(word)
    rank_in_word = jnp.arange(capacity, dtype=jnp.int32) - starts.at[word].get(
        mode="promise_in_bounds"
    )
    bit = _select_bit(words.at[word].get(mode="promise_in_bounds"), rank_in_word)
    return word, jnp.minimum(bit, BITS - 1), ends[-1]


def mask_to_words(mask: Bool[Array, " n"]) -> UInt32[Array, " m"]:
    """Packs a flat mask into words for `compact`.

    Args:
        mask: one bit per slot.

    Returns:
        ``ceil(n / 32)`` words, uint32.
    """
    padded = jnp.pad(mask, (0, -mask.shape[0] % BITS))
    return pack_bits(padded.reshape(-1, BITS)).reshape(-1)
