"""From a model's virial to lattice gradients, stress and pressure, in torch.

Every function can be scripted, exported, and captured into a CUDA graph: plain tensor annotations,
no `torch.linalg` (it raises on singular matrices and waits for the device), no value read on the
host. `_lattice_jax` holds the twins.

Conventions: Å, eV, eV/Å. Rows of `cell` (h) are lattice vectors, `r = frac @ h`. A strain ε acts as
`r → r + r @ ε`, `h → h + h @ ε`.
"""

import torch


def lattice_gradient_from_virial(
    forces: torch.Tensor,
    positions: torch.Tensor,
    batch: torch.Tensor,
    cell: torch.Tensor,
    virial: torch.Tensor,
) -> torch.Tensor:
    """`∂E/∂h[s] = h⁻ᵀ (virial[s] + Σ_{b∈s} r_b ⊗ F_b)`, at fixed Cartesian positions.

    With g = −F = ∂E/∂r, the derivative of the energy by a strain of positions and cell together is
    `Σ r ⊗ g + hᵀ ∂E/∂h`. Rotational invariance makes this sum symmetric, neither term alone is, so
    the symmetric virial determines ∂E/∂h exactly; solving for it with a symmetrised `hᵀ ∂E/∂h`
    would not.

    A lattice vector that is exactly zero gets a row of zeros, which is exact for slabs, wires and
    molecules.

    Args:
        forces: `(N, 3)`, −∂E/∂r in eV/Å.
        positions: `(N, 3)` in Å, those that the energy was evaluated at, wrapped or not.
        batch: `(N,)`, integer, system of each atom.
        cell: `(B, 3, 3)` in Å, rows are lattice vectors.
        virial: `(B, 3, 3)`, +dE/dε in eV, symmetric. MACE's `virials` has the opposite sign.

    Returns:
        `(B, 3, 3)` in eV/Å, in the highest precision among the arguments; NaN for a system whose
        non-zero lattice vectors are linearly dependent: |det h| ≤ 1e-12 |a||b||c|, or 1e-6
        |a||b||c| for cells in less than double precision.

    Raises:
        ValueError: If a shape is not as above.
    """
    _check_shapes(forces, positions, batch, cell, virial, "virial")
    dtype = _highest(forces, positions, cell, virial)
    work = torch.promote_types(dtype, torch.float32)
    inverse, zero, singular = _inverse_transpose(cell.to(work), _tolerance(cell))
    moment = _force_moment(forces.to(work), positions.to(work), batch, cell.size(0))
    gradient = _matmul3(inverse, virial.to(work) + moment)
    gradient = torch.where(zero.unsqueeze(-1), torch.zeros_like(gradient), gradient)
    return _nan_where(singular, gradient).to(dtype)


def virial_from_lattice_gradient(
    forces: torch.Tensor,
    positions: torch.Tensor,
    batch: torch.Tensor,
    cell: torch.Tensor,
    cell_gradients: torch.Tensor,
) -> torch.Tensor:
    """`virial[s] = ½ (G + Gᵀ)`, `G = hᵀ ∂E/∂h[s] − Σ_{b∈s} r_b ⊗ F_b`.

    The inverse of `lattice_gradient_from_virial` for energies that are rotationally invariant; for
    others it keeps the symmetric part, the derivative by symmetric strains.

    Args:
        forces: `(N, 3)`, −∂E/∂r in eV/Å.
        positions: `(N, 3)` in Å, those that the energy was evaluated at.
        batch: `(N,)`, integer, system of each atom.
        cell: `(B, 3, 3)` in Å, rows are lattice vectors; any of them may be zero.
        cell_gradients: `(B, 3, 3)`, ∂E/∂h in eV/Å at fixed Cartesian positions.

    Returns:
        `(B, 3, 3)`, +dE/dε in eV, symmetric, in the highest precision among the arguments.

    Raises:
        ValueError: If a shape is not as above.
    """
    _check_shapes(forces, positions, batch, cell, cell_gradients, "cell_gradients")
    dtype = _highest(forces, positions, cell, cell_gradients)
    work = torch.promote_types(dtype, torch.float32)
    moment = _force_moment(forces.to(work), positions.to(work), batch, cell.size(0))
    total = _matmul3(cell.to(work).transpose(1, 2), cell_gradients.to(work)) - moment
    return (0.5 * (total + total.transpose(1, 2))).to(dtype)


# `convention` would be keyword-only, but TorchScript refuses keyword-only arguments with defaults.
def stress_from_virial(
    virial: torch.Tensor, cell: torch.Tensor, convention: str = "ase"
) -> torch.Tensor:
    """`σ = ±virial / V`, `V = |det h|`: + for "ase" (ASE, MACE, UMA), − for "kups".

    Args:
        virial: `(B, 3, 3)`, +dE/dε in eV.
        cell: `(B, 3, 3)` in Å, rows are lattice vectors.
        convention: "ase": positive where the system pulls inwards. "kups": the opposite sign.

    Returns:
        `(B, 3, 3)` in eV/Å³, in the highest precision among the arguments. A system without a
        volume has no stress: NaN where a lattice vector is zero or the three are linearly
        dependent.

    Raises:
        ValueError: If a shape is not as above, or the convention is unknown.
    """
    _check_matrices(cell, "cell")
    _check_matrices(virial, "virial")
    if virial.size(0) != cell.size(0):
        raise ValueError(
            f"torchcall: virial: expected {_shape(cell)} as the cell, got {_shape(virial)}"
        )
    sign = _stress_sign(convention)
    dtype = torch.promote_types(virial.dtype, cell.dtype)
    work = torch.promote_types(dtype, torch.float32)
    vectors = cell.to(work)
    volume = _determinant(vectors, _crosses(vectors)).abs()
    flat = _is_singular(vectors, volume, _tolerance(cell))
    divisor = sign * torch.where(flat, torch.ones_like(volume), volume)
    return _nan_where(flat, virial.to(work) / divisor.unsqueeze(-1).unsqueeze(-1)).to(dtype)


def pressure_from_stress(stress: torch.Tensor, *, convention: str) -> torch.Tensor:
    """`P = −dE/dV = ∓tr σ / 3`: − for "ase" (ASE, MACE, UMA), + for "kups".

    Args:
        stress: `(B, 3, 3)` in eV/Å³.
        convention: That of `stress`, "ase" or "kups".

    Returns:
        `(B,)` in eV/Å³ (1 eV/Å³ = 160.21766208 GPa), positive under compression. The static part
        only: a system in motion adds N k_B T / V.

    Raises:
        ValueError: If the shape is not as above, or the convention is unknown.
    """
    _check_matrices(stress, "stress")
    return (-_stress_sign(convention) / 3.0) * stress.diagonal(dim1=1, dim2=2).sum(-1)


def _highest(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.dtype:
    return torch.promote_types(
        torch.promote_types(a.dtype, b.dtype), torch.promote_types(c.dtype, d.dtype)
    )


def _force_moment(
    forces: torch.Tensor, positions: torch.Tensor, batch: torch.Tensor, n_systems: int
) -> torch.Tensor:
    """`Σ_{b∈s} r_b ⊗ F_b`, as `(B, 3, 3)`."""
    outer = positions.unsqueeze(2) * forces.unsqueeze(1)
    total = torch.zeros((n_systems, 3, 3), dtype=outer.dtype, device=outer.device)
    return total.index_add(0, batch, outer)


def _matmul3(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of `(B, 3, 3)` matrices, out of reach of reduced-precision matrix units."""
    return (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)


def _cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # torch.cross is torch.linalg.cross underneath.
    return a.roll([-1], [-1]) * b.roll([-2], [-1]) - a.roll([-2], [-1]) * b.roll([-1], [-1])


def _crosses(cell: torch.Tensor) -> torch.Tensor:
    """`[b×c, c×a, a×b]` of `[a, b, c]`."""
    return _cross(cell.roll([-1], [1]), cell.roll([-2], [1]))


def _determinant(cell: torch.Tensor, crosses: torch.Tensor) -> torch.Tensor:
    return (cell.select(1, 0) * crosses.select(1, 0)).sum(-1)


def _tolerance(cell: torch.Tensor) -> float:
    """The sine product |det h| / (|a||b||c|) below which a cell counts as flat.

    By the precision that the cell comes in: rounding lifts flat single-precision cells to 1e-7.
    """
    return 1e-12 if cell.dtype == torch.float64 else 1e-6


def _is_singular(cell: torch.Tensor, determinant: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Whether the lattice vectors are linearly dependent; true for NaN too."""
    lengths = (cell * cell).sum(-1).sqrt()
    return ~(determinant.abs() > tolerance * lengths.prod(-1))


def _nan_where(systems: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    nan = torch.full_like(values, float("nan"))
    return torch.where(systems.unsqueeze(-1).unsqueeze(-1), nan, values)


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    """Unit vectors; zero vectors stay."""
    square = (vectors * vectors).sum(-1, keepdim=True)
    return vectors / torch.where(square > 0, square, torch.ones_like(square)).sqrt()


def _inverse_transpose(
    cell: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`h⁻ᵀ = [b×c, c×a, a×b] / det`, after orthonormal vectors took the place of zero ones.

    Returns:
        h⁻ᵀ `(B, 3, 3)`, which lattice vectors were zero `(B, 3)`, which systems are singular
        `(B,)`.
    """
    zero = (cell == 0).all(-1)
    n_zero = zero.sum(-1).unsqueeze(-1)
    identity = torch.eye(3, dtype=cell.dtype, device=cell.device)

    # No vector at all.
    h = torch.where((n_zero == 3).unsqueeze(-1), identity, cell)
    # One vector: the next row becomes perpendicular to it, by way of the axis farthest from it.
    only = cell.sum(1)
    normal = _unit(_cross(only, identity.index_select(0, only.abs().argmin(-1))))
    after = (~zero).roll([1], [1]) & (n_zero == 2)
    h = torch.where(after.unsqueeze(-1), normal.unsqueeze(1), h)
    # Two vectors: the third row becomes their normal; parallel ones leave zeros, hence det = 0.
    missing = zero & ~after & (n_zero < 3)
    h = torch.where(missing.unsqueeze(-1), _unit(_crosses(h)), h)

    crosses = _crosses(h)
    determinant = _determinant(h, crosses)
    singular = _is_singular(h, determinant, tolerance)
    divisor = torch.where(singular, torch.ones_like(determinant), determinant)
    return crosses / divisor.unsqueeze(-1).unsqueeze(-1), zero, singular


def _stress_sign(convention: str) -> float:
    if convention == "ase":
        return 1.0
    if convention == "kups":
        return -1.0
    raise ValueError(f'torchcall: convention: expected "ase" or "kups", got "{convention}"')


def _shape(tensor: torch.Tensor) -> str:
    sizes = [str(n) for n in tensor.size()]
    return "(" + ", ".join(sizes) + (",)" if len(sizes) == 1 else ")")


def _check_matrices(tensor: torch.Tensor, name: str) -> None:
    if tensor.dim() != 3 or tensor.size(1) != 3 or tensor.size(2) != 3:
        raise ValueError(f"torchcall: {name}: expected (B, 3, 3), got {_shape(tensor)}")


def _check_shapes(
    forces: torch.Tensor,
    positions: torch.Tensor,
    batch: torch.Tensor,
    cell: torch.Tensor,
    matrices: torch.Tensor,
    name: str,
) -> None:
    if positions.dim() != 2 or positions.size(1) != 3:
        raise ValueError(f"torchcall: positions: expected (N, 3), got {_shape(positions)}")
    if forces.dim() != 2 or forces.size(0) != positions.size(0) or forces.size(1) != 3:
        raise ValueError(
            f"torchcall: forces: expected {_shape(positions)} as positions, got {_shape(forces)}"
        )
    if batch.dim() != 1 or batch.size(0) != positions.size(0):
        raise ValueError(
            f"torchcall: batch: expected ({positions.size(0)},) as positions, got {_shape(batch)}"
        )
    _check_matrices(cell, "cell")
    _check_matrices(matrices, name)
    if matrices.size(0) != cell.size(0):
        raise ValueError(
            f"torchcall: {name}: expected {_shape(cell)} as the cell, got {_shape(matrices)}"
        )
