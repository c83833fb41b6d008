"""From a model's virial to lattice gradients, stress and pressure, in JAX.

The twins of `_lattice_torch`: same formulas, same results. They trace under `jit`, `vmap` and
`grad`, in any precision and with x64 on or off.

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
) -> Float[Array, "B 3 3"]:
    """`∂E/∂h[s] = h⁻ᵀ (virial[s] + Σ_{b∈s} r_b ⊗ F_b)`, at fixed Cartesian positions.

    With g = −F = ∂E/∂r, the derivative of the energy by a strain of positions and cell together is
    `Σ r ⊗ g + hᵀ ∂E/∂h`. Rotational invariance makes this sum symmetric, neither term alone is, so
    the symmetric virial determines ∂E/∂h exactly.

    A lattice vector that is exactly zero gets a row of zeros, which is exact for slabs, wires and
    molecules.

    Args:
        forces: −∂E/∂r in eV/Å.
        positions: In Å, those that the energy was evaluated at, wrapped or not.
        batch: System of each atom; atoms of systems outside `[0, B)` count nowhere.
        cell: In Å, rows are lattice vectors.
        virial: +dE/dε in eV, symmetric.

    Returns:
        In eV/Å, in the highest precision among the arguments; NaN for a system whose non-zero
        lattice vectors are linearly dependent: |det h| ≤ 1e-12 |a||b||c|, or 1e-6 |a||b||c| for
        cells in less than double precision.

    Raises:
        ValueError: If a shape is not as above.
    """
    _check_shapes(forces, positions, batch, cell, virial=virial)
    dtype, work = _precisions(forces, positions, cell, virial)
    inverse, zero, singular = _inverse_transpose(cell.astype(work), _tolerance(cell))
    moment = _force_moment(forces.astype(work), positions.astype(work), batch, len(cell))
    gradient = _matmul3(inverse, virial.astype(work) + moment)
    gradient = jnp.where(zero[..., None], 0.0, gradient)
    return jnp.where(singular[:, None, None], jnp.nan, gradient).astype(dtype)


def virial_from_lattice_gradient_jax(
    forces: Float[Array, "N 3"],
    positions: Float[Array, "N 3"],
    batch: Int[Array, " N"],
    cell: Float[Array, "B 3 3"],
    cell_gradients: Float[Array, "B 3 3"],
) -> Float[Array, "B 3 3"]:
    """`virial[s] = ½ (G + Gᵀ)`, `G = hᵀ ∂E/∂h[s] − Σ_{b∈s} r_b ⊗ F_b`.

    The inverse of `lattice_gradient_from_virial_jax` for energies that are rotationally invariant;
    for others it keeps the symmetric part, the derivative by symmetric strains.

    Args:
        forces: −∂E/∂r in eV/Å.
        positions: In Å, those that the energy was evaluated at.
        batch: System of each atom; atoms of systems outside `[0, B)` count nowhere.
        cell: In Å, rows are lattice vectors; any of them may be zero.
        cell_gradients: ∂E/∂h in eV/Å at fixed Cartesian positions.

    Returns:
        +dE/dε in eV, symmetric, in the highest precision among the arguments.

    Raises:
        ValueError: If a shape is not as above.
    """
    _check_shapes(forces, positions, batch, cell, cell_gradients=cell_gradients)
    dtype, work = _precisions(forces, positions, cell, cell_gradients)
    moment = _force_moment(forces.astype(work), positions.astype(work), batch, len(cell))
    total = _matmul3(jnp.matrix_transpose(cell.astype(work)), cell_gradients.astype(work)) - moment
    return (0.5 * (total + jnp.matrix_transpose(total))).astype(dtype)


def stress_from_virial_jax(
    virial: Float[Array, "B 3 3"], cell: Float[Array, "B 3 3"], *, convention: str = "ase"
) -> Float[Array, "B 3 3"]:
    """`σ = ±virial / V`, `V = |det h|`: + for "ase" (ASE, MACE, UMA), − for "kups".

    Args:
        virial: +dE/dε in eV.
        cell: In Å, rows are lattice vectors.
        convention: "ase": positive where the system pulls inwards. "kups": the opposite sign.

    Returns:
        In eV/Å³, in the highest precision among the arguments. A system without a volume has no
        stress: NaN where a lattice vector is zero or the three are linearly dependent.

    Raises:
        ValueError: If a shape is not as above, or the convention is unknown.
    """
    _check_matrices(cell=cell)
    _check_matrices(len(cell), virial=virial)
    sign = _stress_sign(convention)
    dtype, work = _precisions(virial, cell)
    vectors = cell.astype(work)
    volume = jnp.abs(_determinant(vectors, _crosses(vectors)))
    flat = _is_singular(vectors, volume, _tolerance(cell))[:, None, None]
    divisor = jnp.where(flat, 1.0, volume[:, None, None])
    return jnp.where(flat, jnp.nan, sign * virial.astype(work) / divisor).astype(dtype)


def pressure_from_stress_jax(
    stress: Float[Array, "B 3 3"], *, convention: str
) -> Float[Array, " B"]:
    """`P = −dE/dV = ∓tr σ / 3`: − for "ase" (ASE, MACE, UMA), + for "kups".

    Args:
        stress: In eV/Å³.
        convention: That of `stress`, "ase" or "kups".

    Returns:
        In eV/Å³ (1 eV/Å³ = 160.21766208 GPa), positive under compression. The static part only: a
        system in motion adds N k_B T / V.

    Raises:
        ValueError: If the shape is not as above, or the convention is unknown.
    """
    _check_matrices(stress=stress)
    return (-_stress_sign(convention) / 3.0) * jnp.trace(stress, axis1=1, axis2=2)


def _precisions(*arrays: Array) -> tuple[Any, Any]:
    """The highest dtype among the arrays, and the one to compute in: at least single precision."""
    with jax.numpy_dtype_promotion("standard"):
        highest = jnp.result_type(*(array.dtype for array in arrays))
        return highest, jnp.promote_types(highest, jnp.float32)


def _force_moment(
    forces: Float[Array, "N 3"],
    positions: Float[Array, "N 3"],
    batch: Int[Array, " N"],
    n_systems: int,
) -> Float[Array, "B 3 3"]:
    """`Σ_{b∈s} r_b ⊗ F_b`; a scatter-add drops what is out of range."""
    return jax.ops.segment_sum(positions[:, :, None] * forces[:, None, :], batch, n_systems)


def _matmul3(a: Float[Array, "B 3 3"], b: Float[Array, "B 3 3"]) -> Float[Array, "B 3 3"]:
    """`a @ b`, out of reach of reduced-precision matrix units."""
    return (a[..., None] * b[:, None]).sum(2)


def _crosses(cell: Float[Array, "B 3 3"]) -> Float[Array, "B 3 3"]:
    """`[b×c, c×a, a×b]` of `[a, b, c]`."""
    return jnp.cross(jnp.roll(cell, -1, axis=1), jnp.roll(cell, -2, axis=1))


def _determinant(cell: Float[Array, "B 3 3"], crosses: Float[Array, "B 3 3"]) -> Float[Array, " B"]:
    return (cell[:, 0] * crosses[:, 0]).sum(-1)


def _tolerance(cell: Float[Array, "B 3 3"]) -> float:
    """The sine product |det h| / (|a||b||c|) below which a cell counts as flat.

    By the precision that the cell comes in: rounding lifts flat single-precision cells to 1e-7.
    """
    return 1e-12 if cell.dtype == jnp.float64 else 1e-6


def _is_singular(
    cell: Float[Array, "B 3 3"], determinant: Float[Array, " B"], tolerance: float
) -> Bool[Array, " B"]:
    """Whether the lattice vectors are linearly dependent; true for NaN too."""
    length = jnp.linalg.norm(cell, axis=-1).prod(-1)
    return ~(jnp.abs(determinant) > tolerance * length)


def _unit(vectors: Float[Array, "*n 3"]) -> Float[Array, "*n 3"]:
    """Unit vectors; zero vectors stay."""
    square = (vectors * vectors).sum(-1, keepdims=True)
    return vectors / jnp.sqrt(jnp.where(square > 0, square, 1.0))


def _inverse_transpose(
    cell: Float[Array, "B 3 3"], tolerance: float
) -> tuple[Float[Array, "B 3 3"], Bool[Array, "B 3"], Bool[Array, " B"]]:
    """`h⁻ᵀ = [b×c, c×a, a×b] / det`, after orthonormal vectors took the place of zero ones.

    Returns:
        h⁻ᵀ, which lattice vectors were zero, which systems are singular.
    """
    zero = (cell == 0).all(-1)
    n_zero = zero.sum(-1, keepdims=True)
    identity = jnp.eye(3, dtype=cell.dtype)

    # No vector at all.
    h = jnp.where((n_zero == 3)[..., None], identity, cell)
    # One vector: the next row becomes perpendicular to it, by way of the axis farthest from it.
    only = cell.sum(1)
    normal = _unit(jnp.cross(only, identity[jnp.abs(only).argmin(-1)]))
    after = jnp.roll(~zero, 1, axis=1) & (n_zero == 2)
    h = jnp.where(after[..., None], normal[:, None], h)
    # Two vectors: the third row becomes their normal; parallel ones leave zeros, hence det = 0.
    missing = zero & ~after & (n_zero < 3)
    h = jnp.where(missing[..., None], _unit(_crosses(h)), h)

    crosses = _crosses(h)
    determinant = _determinant(h, crosses)
    singular = _is_singular(h, determinant, tolerance)
    return crosses / jnp.where(singular, 1.0, determinant)[:, None, None], zero, singular


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
