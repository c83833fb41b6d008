"""Whether atoms or cells have moved too far for the edges of a neighbour list."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Finite differences at fixed pairs move atoms by less than this, in Å.
_LEAST_ALLOWANCE = 0.05

_Vector = tuple[Array, Array, Array]


def moved_too_far(
    positions: Float[Array, "n 3"],
    cell: Float[Array, "b 3 3"],
    listed_positions: Float[Array, "n 3"],
    listed_cell: Float[Array, "b 3 3"],
    pbc: Bool[Array, "b 3"],
    *,
    cutoff: float,
    skin: float,
) -> Bool[Array, ""]:
    """Whether `max |x − x₀| > a` or `max ‖h₀⁻¹ h − 1‖ cutoff > a`, with `a = max(skin/2, 0.05 Å)`.

    The norm is Frobenius'. `h₀⁻¹` is the pseudo-inverse of the periodic rows. Displacements are
    those of the coordinates as given: to wrap an atom changes its pairs' offsets. NaN counts as
    moved.

    Args:
        positions: x, in Å.
        cell: h, rows are lattice vectors, in Å.
        listed_positions, listed_cell: x₀ and h₀, those of the list's last update.
        pbc: periodicity of each axis.
        cutoff, skin: the list's, in Å.
    """
    allowance = max(skin / 2, _LEAST_ALLOWANCE)
    change = positions - listed_positions.astype(positions.dtype)
    # In components, and not as products of matrices: XLA makes one loop of it.
    x, y, z = change[:, 0], change[:, 1], change[:, 2]
    near = x * x + y * y + z * z <= allowance**2
    strain = _squared_strain(cell, listed_cell.astype(cell.dtype), pbc)
    return ~(jnp.all(near) & jnp.all(strain <= (allowance / cutoff) ** 2))


def _squared_strain(cell: Array, listed: Array, pbc: Array) -> Array:
    """`‖h₀⁻¹ h − 1‖²` of each system, as `‖Σ_a b_a ⊗ (h − h₀)_a‖²`, `b` the reciprocal vectors."""
    rows, changes = _rows(listed), _rows(cell - listed)
    periodic = [pbc[:, a] for a in range(3)]
    reciprocal = [_reciprocal(rows, periodic, a) for a in range(3)]
    square = jnp.zeros_like(cell[:, 0, 0])
    for i in range(3):
        for j in range(3):
            terms = [jnp.where(periodic[a], reciprocal[a][i] * changes[a][j], 0) for a in range(3)]
            square = square + (terms[0] + terms[1] + terms[2]) ** 2
    return square


def _reciprocal(rows: list[_Vector], periodic: list[Array], a: int) -> _Vector:
    """The vector in the span of the periodic rows with product 1 with row a, 0 with the others."""
    b, c = (a + 1) % 3, (a + 2) % 3
    normal = _cross(rows[b], rows[c])
    beside_b = _cross(_cross(rows[b], rows[a]), rows[b])
    beside_c = _cross(_cross(rows[c], rows[a]), rows[c])
    both, only_b, only_c = periodic[b] & periodic[c], periodic[b], periodic[c]
    x, y, z = (
        jnp.where(both, n, jnp.where(only_b, p, jnp.where(only_c, q, r)))
        for n, p, q, r in zip(normal, beside_b, beside_c, rows[a], strict=True)
    )
    length = x * rows[a][0] + y * rows[a][1] + z * rows[a][2]
    return x / length, y / length, z / length


def _rows(cell: Array) -> list[_Vector]:
    return [(cell[:, a, 0], cell[:, a, 1], cell[:, a, 2]) for a in range(3)]


def _cross(u: _Vector, v: _Vector) -> _Vector:
    return (
        u[1] * v[2] - u[2] * v[1],
        u[2] * v[0] - u[0] * v[2],
        u[0] * v[1] - u[1] * v[0],
    )
