"""The edges of a state, and operations on lists of edges."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from torchcall._call.meshes import aligned
from torchcall.mliap._table import Index, ParticleId


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["indices", "shifts", "n_edges", "did_overflow"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Edges:
    """A full directed list of pairs: `r = x_j − x_i + S h`, `|r| < cutoff`; a pytree.

    Attributes:
        indices: (e, 2), sender i and receiver j; edges with an index out of range are ignored.
        shifts: (e, 1, 3), S, integer-valued, of any dtype.
        n_edges: (), number of valid edges, which come first; None if their positions are unknown.
        did_overflow: () bool, whether pairs may be missing; energies and gradients are then NaN.
            None means False.
    """

    indices: Index[ParticleId] | Int[Array, "e 2"]
    shifts: Float[Array, "e 1 3"] | Int[Array, "e 1 3"]
    n_edges: Int[Array, ""] | None = None
    did_overflow: Bool[Array, ""] | None = None


def within_cutoffs(
    edges: tuple[Array, Array, Array], positions: Array, cell: Array, system: Array, cutoffs: Array
) -> tuple[Array, Array, Array]:
    """The edges shorter than their system's cutoff."""
    index, offsets, n_edges = edges
    n = positions.shape[0]
    used = (lax.iota(jnp.int32, index.shape[1]) < n_edges) & jnp.all(index < n, axis=0)
    i, j = jnp.where(used, index, 0)
    shift = jnp.einsum("ek,ekl->el", offsets, cell[system[i]], precision="highest")
    r = jnp.linalg.norm(positions[j] - positions[i] + shift, axis=-1)
    return compact(index, offsets, used & (r < cutoffs[system[i]]))


@jax.jit
def compact(
    index: Int[Array, "2 e"], offsets: Array, valid: Bool[Array, " e"]
) -> tuple[Int[Array, "2 e"], Array, Int[Array, ""]]:
    """Moves the valid edges to the front, in order, and counts them. Other slots are arbitrary."""
    count = jnp.sum(valid, dtype=jnp.int32)
    # Inside `shard_map`, both branches must vary over the same axes of the mesh.
    index, offsets, valid = aligned([index, offsets, valid])

    def move() -> tuple[Array, Array]:
        e = valid.shape[0]
        to = jnp.where(valid, jnp.cumsum(valid, dtype=jnp.int32) - 1, e)
        return (
            jnp.zeros_like(index).at[:, to].set(index, mode="drop"),
            jnp.zeros_like(offsets).at[to].set(offsets, mode="drop"),
        )

    def move_if_needed() -> tuple[Array, Array]:
        return lax.cond(jnp.all(valid[1:] <= valid[:-1]), lambda: (index, offsets), move)

    # On a GPU, a condition would synchronise with the host.
    index, offsets = lax.platform_dependent(cpu=move_if_needed, default=move)
    return index, offsets, count
