"""Lattice gradients, stress and pressure from a model's virial, in JAX.

Same formulas and results as `_lattice_torch`. The functions trace under `jit`, `vmap` and `grad`,
in any precision and with x64 on or off.

Conventions: Å, eV, eV/Å. Rows of `cell` (h) are lattice vectors, `r = frac @ h`. A strain ε acts as
`r → r + r @ ε`, `h → h + h @ ε`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def lattice_gradient_from_virial_jax(
    forces: Float[Array, "N 3"],
    positions: Float[Array, "N 3"],
    batch: Int[Array, " N"],
    cell: Float[Array, "B 3 3"],
    virial: Float[Array, "B 3 3"],
    pbc: Bool[Array, "B 3"] | None = None,
) -> Float[Array, "B 3 3"]:
    """`∂E/∂h[s] = h⁻ᵀ (virial[s] + Σ_{b∈s} r_b ⊗ F_b)`, at fixed Cartesian positions.

    With g = −F = ∂E/∂r, the derivative of the energy by a strain of positions and cell together is
    `G = Σ r ⊗ g + hᵀ ∂E/∂h`. The energy is invariant under rotations, so G is symmetric although
    neither of its terms is, and the symmetric virial determines ∂E/∂h exactly.

    The energy is invariant under translations too: the forces of a system sum to zero. So r_b is
    measured from the mean position of the system, which preserves precision far from the origin.
    A net force is ignored.

    Open axes get rows of zeros, which is exact for slabs, wires and molecules. An axis is open if
    `pbc` is false for it, even if its lattice vector is not zero, or if its vector is exactly zero.

    Args:
        forces: −∂E/∂r in eV/Å.
        positions: In Å, where the energy was evaluated, wrapped or not.
        batch: System of each atom; atoms of systems outside `[0, B)` are ignored.
        cell: In Å, rows are lattice vectors.
        virial: +dE/dε in eV, symmetric.
        pbc: Periodicity along each lattice vector. Without it, an axis is open only if its vector
            is zero.

    Returns:
        In eV/Å, in the highest precision among the arguments. NaN for a system whose other lattice
        vectors are linearly dependent: |det h| ≤ 1e-12 |a||b||c|, or 1e-6 |a||b||c| for cells in
        less than double precision, with unit vectors along open axes.

    Raises:
        ValueError: If a shape is not as above.
        TypeError: If pbc is not bool.
    """
    _check_shapes(forces, positions, batch, cell, virial=virial)
    dtype, work = _precisions(forces, positions, cell, virial)
    is_open = _open_axes(cell, pbc)
    inverse, singular = _inverse_transpose(_completed(cell.astype(work), is_open), _tolerance(cell))
    moment = _force_moment(forces.astype(work), positions.astype(work), batch, len(cell))
    gradient = _without_rows(is_open, _matmul3(inverse, virial.astype(work) + moment))
    return jnp.where(singular[:, None, None], jnp.nan, gradient).astype(dtype)


def virial_from_lattice_gradient_jax(
    forces: Float[Array, "N 3"],
    positions: Float[Array, "N 3"],
    batch: Int[Array, " N"],
    cell: Float[Array, "B 3 3"],
    cell_gradients: Float[Array, "B 3 3"],
    pbc: Bool[Array, "B 3"] | None = None,
) -> Float[Array, "B 3 3"]:
    """`virial[s] = ½ (G + Gᵀ)`, `G = hᵀ ∂E/∂h[s] − Σ_{b∈s} r_b ⊗ F_b`.

    The inverse of `lattice_gradient_from_virial_jax` for energies that are invariant under
    rotations; for others it returns the symmetric part, the derivative by symmetric strains. Here
    too, r_b is measured from the mean position of the system, and a net force is ignored.

    Args:
        forces: −∂E/∂r in eV/Å.
        positions: In Å, where the energy was evaluated.
        batch: System of each atom; atoms of systems outside `[0, B)` are ignored.
        cell: In Å, rows are lattice vectors; any of them may be zero.
        cell_gradients: ∂E/∂h in eV/Å at fixed Cartesian positions.
        pbc: Periodicity along each lattice vector. Rows of open axes are ignored, in cell and
            gradients.

    Returns:
        +dE/dε in eV, symmetric, in the highest precision among the arguments.

    Raises:
        ValueError: If a shape is not as above.
        TypeError: If pbc is not bool.
    """
    _check_shapes(forces, positions, batch, cell, cell_gradients=cell_gradients)
    dtype, work = _precisions(forces, positions, cell, cell_gradients)
    moment = _force_moment(forces.astype(work), positions.astype(work), batch, len(cell))
    is_open = _open_axes(cell, pbc)
    vectors = _without_rows(is_open, cell.astype(work))
    rows = _without_rows(is_open, cell_gradients.astype(work))
    total = _matmul3(jnp.matrix_transpose(vectors), rows) - moment
    return (0.5 * (total + jnp.matrix_transpose(total))).astype(dtype)


def stress_from_virial_jax(
    virial: Float[Array, "B 3 3"],
    cell: Float[Array, "B 3 3"],
    *,
    convention: str = "ase",
    pbc: Bool[Array, "B 3"] | None = None,
) -> Float[Array, "B 3 3"]:
    """`σ = ±virial / V`, `V = |det h|`: + for "ase" (ASE, MACE, UMA), − for "kups".

    Args:
        virial: +dE/dε in eV.
        cell: In Å, rows are lattice vectors.
        convention: "ase": positive where the system pulls inwards. "kups": the opposite sign.
        pbc: Open axes have a length of 1 Å, independent of their lattice vectors: V is the area of
            a slab in Å², or the period of a wire in Å. Without pbc, V is the volume of the whole
            cell, vacuum included.

    Returns:
        In eV/Å³, in the highest precision among the arguments. NaN for a system
        without a volume: the lattice vectors that are used are zero or linearly dependent, or no
        axis is periodic.

    Raises:
        ValueError: If a shape is not as above, or the convention is unknown.
    """
    _check_matrices(cell=cell)
    _check_matrices(len(cell), virial=virial)
    sign = _stress_sign(convention)
    dtype, work = _precisions(virial, cell)
    vectors = cell.astype(work)
    if pbc is not None:
        _check_pbc(pbc, len(cell))
        vectors = _completed(vectors, ~pbc)
    volume = jnp.abs(_determinant(vectors, _crosses(vectors)))
    flat = _is_singular(vectors, volume, _tolerance(cell))
    if pbc is not None:
        flat |= ~pbc.any(-1)
    flat = flat[:, None, None]
    divisor = jnp.where(flat, 1.0, volume[:, None, None])
    return jnp.where(flat, jnp.nan, sign * virial.astype(work) / divisor).astype(dtype)


def pressure_from_stress_jax(
    stress: Float[Array, "B 3 3"], pbc: Bool[Array, "B 3"] | None = None, *, convention: str
) -> Float[Array, " B"]:
    """`P = −dE/dV = ∓tr σ / 3`: − for "ase" (ASE, MACE, UMA), + for "kups".

    Args:
        stress: In eV/Å³.
        pbc: Periodicity. The pressure is NaN for a system without a periodic axis.
        convention: That of `stress`, "ase" or "kups".

    Returns:
        In eV/Å³ (1 eV/Å³ = 160.21766208 GPa), positive under compression. The static part only:
        moving atoms add N k_B T / V.

    Raises:
        ValueError: If the shape is not as above, or the convention is unknown.
    """
    _check_matrices(stress=stress)
    pressure = (-_stress_sign(convention) / 3.0) * jnp.trace(stress, axis1=1, axis2=2)
    if pbc is None:
        return pressure
    _check_pbc(pbc, len(stress))
    return jnp.where(pbc.any(-1), pressure, jnp.nan)


def _precisions(*arrays: Array) -> tuple[Any, Any]:
    """The highest dtype among the arrays, and the dtype to compute in: at least float32."""
    with jax.numpy_dtype_promotion("standard"):
        highest = jnp.result_type(*(array.dtype for array in arrays))
        return highest, jnp.promote_types(highest, jnp.float32)


def _force_moment(
    forces: Float[Array, "N 3"],
    positions: Float[Array, "N 3"],
    batch: Int[Array, " N"],
    n_systems: int,
) -> Float[Array, "B 3 3"]:
    """`Σ_{b∈s} r_b ⊗ F_b` about the mean position of each system.

    A scatter-add drops atoms whose system is out of range.
    """
    count = jax.ops.segment_sum(jnp.ones_like(positions[:, :1]), batch, n_systems)
    mean = jax.ops.segment_sum(positions, batch, n_systems) / jnp.maximum(count, 1)
    centred = positions - mean.at[batch].get(mode="clip")
    return jax.ops.segment_sum(centred[:, :, None] * forces[:, None, :], batch, n_systems)


def _matmul3(a: Float[Array, "B 3 3"], b: Float[Array, "B 3 3"]) -> Float[Array, "B 3 3"]:
    """`a @ b`, without matrix units, which may reduce the precision."""
    return (a[..., None] * b[:, None]).sum(2)


def _crosses(cell: Float[Array, "B 3 3"]) -> Float[Array, "B 3 3"]:
    """`[b×c, c×a, a×b]` of `[a, b, c]`."""
    return jnp.cross(jnp.roll(cell, -1, axis=1), jnp.roll(cell, -2, axis=1))


def _determinant(cell: Float[Array, "B 3 3"], crosses: Float[Array, "B 3 3"]) -> Float[Array, " B"]:
    return (cell[:, 0] * crosses[:, 0]).sum(-1)


def _tolerance(cell: Float[Array, "B 3 3"]) -> float:
    """The sine product |det h| / (|a||b||c|) below which a cell counts as flat.

    Depends on the precision of the given cell: rounding makes it 1e-7 for flat float32 cells.
    """
    return 1e-12 if cell.dtype == jnp.float64 else 1e-6


def _is_singular(
    cell: Float[Array, "B 3 3"], determinant: Float[Array, " B"], tolerance: float
) -> Bool[Array, " B"]:
    """Whether the lattice vectors are linearly dependent; true for NaN too."""
    length = jnp.linalg.norm(cell, axis=-1).prod(-1)
    return ~(jnp.abs(determinant) > tolerance * length)


def _unit(vectors: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    """Unit vectors; zero vectors are returned unchanged."""
    square = (vectors * vectors).sum(-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def _open_axes(cell: Float[Array, "B 3 3"], pbc: Bool[Array, "B 3"] | None) -> Bool[Array, "B 3"]:
    """Open axes: those without periodicity or with a zero lattice vector."""
    zero = (cell == 0).all(-1)
    if pbc is None:
        return zero
    _check_pbc(pbc, len(cell))
    return zero | ~pbc


def _without_rows(
    is_open: Bool[Array, "B 3"], rows: Float[Array, "B 3 3"]
) -> Float[Array, "B 3 3"]:
    return jnp.where(is_open[..., None], 0.0, rows)


def _completed(cell: Float[Array, "B 3 3"], is_open: Bool[Array, "B 3"]) -> Float[Array, "B 3 3"]:
    """The cell with unit vectors along open axes, perpendicular to the others and each other."""
    cell = _without_rows(is_open, cell)
    n_open = is_open.sum(-1, keepdims=True)
    identity = jnp.eye(3, dtype=cell.dtype)
    h = jnp.where((n_open == 3)[..., None], identity, cell)
    # One vector: the next row becomes its cross product with the axis farthest from it.
    only = cell.sum(1)
    normal = _unit(jnp.cross(only, identity[jnp.abs(only).argmin(-1)]))
    after = jnp.roll(~is_open, 1, axis=1) & (n_open == 2)
    h = jnp.where(after[..., None], normal[:, None], h)
    # Two vectors: the third row becomes their normal. If they are parallel, it is 0 and det = 0.
    missing = is_open & ~after & (n_open < 3)
    return jnp.where(missing[..., None], _unit(_crosses(h)), h)


def _inverse_transpose(
    cell: Float[Array, "B 3 3"], tolerance: float
) -> tuple[Float[Array, "B 3 3"], Bool[Array, " B"]]:
    """`h⁻ᵀ = [b×c, c×a, a×b] / det`, and which systems are singular."""
    crosses = _crosses(cell)
    determinant = _determinant(cell, crosses)
    singular = _is_singular(cell, determinant, tolerance)
    return crosses / jnp.where(singular, 1.0, determinant)[:, None, None], singular


def _stress_sign(convention: str) -> float:
    signs = {"ase": 1.0, "kups": -1.0}
    if convention not in signs:
        raise ValueError(f'torchcall: convention: expected "ase" or "kups", got {convention!r}')
    return signs[convention]


def _check_matrices(n_systems: int | None = None, /, **arrays: Array) -> None:
    for name, array in arrays.items():
        if array.ndim != 3 or array.shape[1:] != (3, 3):
            raise ValueError(f"torchcall: {name}: expected (B, 3, 3), got {array.shape}")
        if n_systems not in (None, len(array)):
            raise ValueError(
                f"torchcall: {name}: expected {(n_systems, 3, 3)} as the cell, got {array.shape}"
            )


def _check_pbc(pbc: Array, n_systems: int) -> None:
    if pbc.shape != (n_systems, 3):
        raise ValueError(f"torchcall: pbc: expected {(n_systems, 3)}, got {pbc.shape}")
    if pbc.dtype != jnp.bool_:
        raise TypeError(f"torchcall: pbc: expected bool, got {pbc.dtype}")


def _check_shapes(
    forces: Array, positions: Array, batch: Array, cell: Array, **matrices: Array
) -> None:
    if positions.ndim != 2 or positions.shape[1] != 3:
        raise ValueError(f"torchcall: positions: expected (N, 3), got {positions.shape}")
    for name, array, expected in (
        ("forces", forces, positions.shape),
        ("batch", batch, positions.shape[:1]),
    ):
        if array.shape != expected:
            raise ValueError(
                f"torchcall: {name}: expected {expected} as positions, got {array.shape}"
            )
    _check_matrices(cell=cell)
    _check_matrices(len(cell), **matrices)
