"""Cells completed to three independent vectors, their reciprocals, and a bound on rounding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


class Frame(NamedTuple):
    """Cells completed to three independent vectors, with reciprocals and heights.

    Attributes:
        cell: (B, 3, 3), rows are lattice vectors; those of open axes are unit vectors normal to
            the others.
        inverse: (B, 3, 3), ``cell @ inverse = 1``.
        heights: (B, 3), distance between the faces of the cell along each axis, in Å.
        slack: (), bound on the rounding error of a distance or a bin boundary, in Å.
        finite: (), whether all values are finite and no periodic cell is flat.
    """

    cell: Float[Array, "B 3 3"]
    inverse: Float[Array, "B 3 3"]
    heights: Float[Array, "B 3"]
    slack: Float[Array, ""]
    finite: Bool[Array, ""]


def complete_cell(cell: Float[Array, "*B 3 3"], pbc: Bool[Array, "*B 3"]) -> Float[Array, "*B 3 3"]:
    """Replaces vectors of open axes by unit vectors normal to the periodic ones and each other.

    Args:
        cell: rows are lattice vectors, in Å; rows of open axes are ignored, whether zero or not.
        pbc: periodicity of each axis.

    Returns:
        Cells of the same shape and dtype.
    """
    rows = [jnp.where(pbc[..., k, None], cell[..., k, :], 0) for k in range(3)]
    periodic = [pbc[..., k, None] for k in range(3)]
    n_periodic = jnp.sum(pbc, axis=-1, dtype=jnp.int32)[..., None]
    eye = jnp.broadcast_to(jnp.eye(3, dtype=cell.dtype), cell.shape)
    # One periodic vector: it is never parallel to the axis of its smallest component.
    only = rows[0] + rows[1] + rows[2]
    smallest = jnp.argmin(jnp.abs(only), axis=-1)
    second = _unit(jnp.cross(only, jax.nn.one_hot(smallest, 3, dtype=cell.dtype)))
    after_only = [periodic[(k - 1) % 3] & (n_periodic == 1) for k in range(3)]
    rows = [jnp.where(after_only[k], second, rows[k]) for k in range(3)]
    periodic = [periodic[k] | after_only[k] for k in range(3)]
    normals = [_unit(jnp.cross(rows[(k + 1) % 3], rows[(k + 2) % 3])) for k in range(3)]
    rows = [jnp.where(periodic[k], rows[k], normals[k]) for k in range(3)]
    return jnp.where(n_periodic[..., None] == 0, eye, jnp.stack(rows, axis=-2))


def _unit(vector: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    square = jnp.sum(vector * vector, axis=-1, keepdims=True)
    return vector / jnp.sqrt(jnp.where(square > 0, square, 1))


def make_frame(
    positions: Float[Array, "N 3"],
    cell: Float[Array, "B 3 3"],
    pbc: Bool[Array, "B 3"],
    cutoff: float,
) -> Frame:
    """Completes and inverts the cells, and bounds the rounding errors of a search.

    Args:
        positions: in Å, wrapped or not.
        cell: rows are lattice vectors, in Å.
        pbc: periodicity of each axis.
        cutoff: search radius, in Å.

    Returns:
        The frame. If ``finite`` is false, its values are meaningless.
    """
    full = complete_cell(cell, pbc)
    a, b, c = full[:, 0], full[:, 1], full[:, 2]
    normals = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)], axis=-1)
    volume = jnp.sum(a * normals[..., 0], axis=-1)
    inverse = normals / volume[:, None, None]
    heights = 1 / jnp.sqrt(jnp.sum(inverse * inverse, axis=-2))
    residual = jnp.max(
        jnp.abs(
            jnp.einsum("bij,bjk->bik", full, inverse, precision="highest")
            - jnp.eye(3, dtype=full.dtype)
        )
    )
    eps = jnp.finfo(positions.dtype).eps
    largest = jnp.max(jnp.abs(positions), initial=0)
    size = largest + cutoff + jnp.max(jnp.sum(jnp.abs(full), axis=(1, 2)))
    slack = 16 * eps * size + 2 * residual * (cutoff + jnp.max(heights))
    # Beyond 2**22 cells from the origin, wraps are not exact in float32.
    far = largest / jnp.min(heights)
    finite = (
        jnp.isfinite(slack)
        & jnp.isfinite(far)
        & (far < jnp.asarray(2.0**22, far.dtype))
        & jnp.all(jnp.isfinite(cell))
    )
    return Frame(
        full,
        inverse,
        heights,
        slack.astype(positions.dtype),
        finite & jnp.all(jnp.isfinite(positions)),
    )
