"""Whether atoms or cells have moved too far for the edges of a neighbour list."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite differences at fixed pairs move atoms by less than this, in Å.
_LEAST_ALLOWANCE = 0.05

_Vector = tuple[Array, Array, Array]
_Matrix = tuple[_Vector, _Vector, _Vector]


def moved_too_far(
    positions: Float[Array, "n 3"],
    cell: Float[Array, "b 3 3"],
    listed_positions: Float[Array, "n 3"],
    listed_cell: Float[Array, "b 3 3"],
    pbc: Bool[Array, "b 3"],
    batch: Int[Array, " n"] | None,
    *,
    cutoff: float,
    skin: float,
) -> Bool[Array, ""]:
    """Whether `max |u| > a` or `max ‖F − 1‖ cutoff > a`, with `a = max(skin/2, 0.05 Å)`.

    `F = h₀⁻¹ h` is the deformation of the cell since the list's last update, and
    `u = x − x₀ F` what an atom moved beside it. So an edge vector has changed from r₀ to
    `r₀ F + u_j − u_i`, whichever images it joins. The norm is Frobenius'. `h₀⁻¹` is the
    pseudo-inverse of the periodic rows. Displacements are those of the coordinates as given: to
    wrap an atom changes its pairs' offsets. NaN counts as moved.

    Args:
        positions: x, in Å.
        cell: h, rows are lattice vectors, in Å.
        listed_positions, listed_cell: x₀ and h₀, those of the list's last update.
        pbc: periodicity of each axis.
        batch: system of each atom; None for one system. Atoms outside `[0, b)` are padding and may
            move.
        cutoff, skin: the list's, in Å.
    """
    allowance = max(skin / 2, _LEAST_ALLOWANCE)
    # In components, and not as products of matrices: XLA makes one loop of it.
    strain = _strain(cell, listed_cell.astype(cell.dtype), pbc)
    square = sum((s * s for row in strain for s in row), jnp.zeros_like(cell[:, 0, 0]))
    near = _squared_moves(positions, listed_positions, strain, batch) <= allowance**2
    if batch is not None:
        near |= (batch < 0) | (batch >= cell.shape[0])
    return ~(jnp.all(near) & jnp.all(square <= (allowance / cutoff) ** 2))


def _squared_moves(
    positions: Array, listed: Array, strain: _Matrix, batch: Array | None
) -> Float[Array, " n"]:
    """`|u|²` of each atom, `u = (x − x₀) − x₀ (F − 1)`."""
    listed = listed.astype(positions.dtype)
    old = (listed[:, 0], listed[:, 1], listed[:, 2])
    square = jnp.zeros_like(old[0])
    for j in range(3):
        own = [row[j] if batch is None else row[j][batch] for row in strain]
        deformed = old[0] * own[0] + old[1] * own[1] + old[2] * own[2]
        square = square + (positions[:, j] - old[j] - deformed) ** 2
    return square


def _strain(cell: Array, listed: Array, pbc: Array) -> _Matrix:
    """`F − 1` of each system, as `Σ_a b_a ⊗ (h − h₀)_a`, `b` the reciprocal vectors."""
    rows, changes = _rows(listed), _rows(cell - listed)
    periodic = [pbc[:, a] for a in range(3)]
    reciprocal = [_reciprocal(rows, periodic, a) for a in range(3)]

    def entry(i: int, j: int) -> Array:
        terms = [jnp.where(periodic[a], reciprocal[a][i] * changes[a][j], 0) for a in range(3)]
        return terms[0] + terms[1] + terms[2]

    x, y, z = ((entry(i, 0), entry(i, 1), entry(i, 2)) for i in range(3))
    return x, y, z


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
