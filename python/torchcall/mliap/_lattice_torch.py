"""Lattice gradients, stress and pressure from a model's virial, in torch.

Every function can be scripted, exported, and captured into a CUDA graph: annotations are plain
tensors, `torch.linalg` is not used (it raises on singular matrices and waits for the device), and
the host reads no value. `_lattice_jax` has the same functions in JAX.

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
    pbc: torch.Tensor | None = None,
) -> torch.Tensor:
    """`∂E/∂h[s] = h⁻ᵀ (virial[s] + Σ_{b∈s} r_b ⊗ F_b)`, at fixed Cartesian positions.

    With g = −F = ∂E/∂r, the derivative of the energy by a strain of positions and cell together is
    `G = Σ r ⊗ g + hᵀ ∂E/∂h`. The energy is invariant under rotations, so G is symmetric although
    neither of its terms is, and the symmetric virial determines ∂E/∂h exactly. A symmetrised
    `hᵀ ∂E/∂h` would not.

    The energy is invariant under translations too: the forces of a system sum to zero. So r_b is
    measured from the mean position of the system, which preserves precision far from the origin.
    A net force is ignored.

    Open axes get rows of zeros, which is exact for slabs, wires and molecules. An axis is open if
    `pbc` is false for it, even if its lattice vector is not zero, or if its vector is exactly zero.

    Args:
        forces: `(N, 3)`, −∂E/∂r in eV/Å.
        positions: `(N, 3)` in Å, where the energy was evaluated, wrapped or not.
        batch: `(N,)`, integer, system of each atom.
        cell: `(B, 3, 3)` in Å, rows are lattice vectors.
        virial: `(B, 3, 3)`, +dE/dε in eV, symmetric. MACE's `virials` has the opposite sign.
        pbc: `(B, 3)` bool, periodicity along each lattice vector. Without it, an axis is open only
            if its vector is zero.

    Returns:
        `(B, 3, 3)` in eV/Å, in the highest precision among the arguments. NaN for a system whose
        other lattice vectors are linearly dependent: |det h| ≤ 1e-12 |a||b||c|, or 1e-6 |a||b||c|
        for cells in less than double precision, with unit vectors along open axes.

    Raises:
        ValueError: If a shape is not as above.
    """
    _check_shapes(forces, positions, batch, cell, virial, "virial")
    dtype = _highest(forces, positions, cell, virial)
    work = torch.promote_types(dtype, torch.float32)
    is_open = _open_axes(cell, pbc)
    inverse, singular = _inverse_transpose(_completed(cell.to(work), is_open), _tolerance(cell))
    moment = _force_moment(forces.to(work), positions.to(work), batch, cell.size(0))
    gradient = _without_rows(is_open, _matmul3(inverse, virial.to(work) + moment))
    return _nan_where(singular, gradient).to(dtype)


def virial_from_lattice_gradient(
    forces: torch.Tensor,
    positions: torch.Tensor,
    batch: torch.Tensor,
    cell: torch.Tensor,
    cell_gradients: torch.Tensor,
    pbc: torch.Tensor | None = None,
) -> torch.Tensor:
    """`virial[s] = ½ (G + Gᵀ)`, `G = hᵀ ∂E/∂h[s] − Σ_{b∈s} r_b ⊗ F_b`.

    The inverse of `lattice_gradient_from_virial` for energies that are invariant under rotations;
    for others it returns the symmetric part, the derivative by symmetric strains. Here too, r_b is
    measured from the mean position of the system, and a net force is ignored.

    Args:
        forces: `(N, 3)`, −∂E/∂r in eV/Å.
        positions: `(N, 3)` in Å, where the energy was evaluated.
        batch: `(N,)`, integer, system of each atom.
        cell: `(B, 3, 3)` in Å, rows are lattice vectors; any of them may be zero.
        cell_gradients: `(B, 3, 3)`, ∂E/∂h in eV/Å at fixed Cartesian positions.
        pbc: `(B, 3)` bool, periodicity along each lattice vector. Rows of open axes are ignored, in
            cell and gradients.

    Returns:
        `(B, 3, 3)`, +dE/dε in eV, symmetric, in the highest precision among the arguments.

    Raises:
        ValueError: If a shape is not as above.
    """
    _check_shapes(forces, positions, batch, cell, cell_gradients, "cell_gradients")
    dtype = _highest(forces, positions, cell, cell_gradients)
    work = torch.promote_types(dtype, torch.float32)
    moment = _force_moment(forces.to(work), positions.to(work), batch, cell.size(0))
    is_open = _open_axes(cell, pbc)
    vectors = _without_rows(is_open, cell.to(work))
    rows = _without_rows(is_open, cell_gradients.to(work))
    total = _matmul3(vectors.transpose(1, 2), rows) - moment
    return (0.5 * (total + total.transpose(1, 2))).to(dtype)


# `convention` would be keyword-only, but TorchScript refuses keyword-only arguments with defaults.
def stress_from_virial(
    virial: torch.Tensor,
    cell: torch.Tensor,
    convention: str = "ase",
    pbc: torch.Tensor | None = None,
) -> torch.Tensor:
    """`σ = ±virial / V`, `V = |det h|`: + for "ase" (ASE, MACE, UMA), − for "kups".

    Args:
        virial: `(B, 3, 3)`, +dE/dε in eV.
        cell: `(B, 3, 3)` in Å, rows are lattice vectors.
        convention: "ase": positive where the system pulls inwards. "kups": the opposite sign.
        pbc: `(B, 3)` bool. Open axes have a length of 1 Å, independent of their lattice vectors: V
            is the area of a slab in Å², or the period of a wire in Å. Without pbc, V is the volume
            of the whole cell, vacuum included.

    Returns:
        `(B, 3, 3)` in eV/Å³, in the highest precision among the arguments. NaN for a system
        without a volume: the lattice vectors that are used are zero or linearly dependent, or no
        axis is periodic.

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
    if pbc is not None:
        _check_pbc(pbc, cell)
        vectors = _completed(vectors, pbc.logical_not())
    volume = _determinant(vectors, _crosses(vectors)).abs()
    flat = _is_singular(vectors, volume, _tolerance(cell))
    if pbc is not None:
        flat = flat | pbc.logical_not().all(-1)
    divisor = sign * torch.where(flat, torch.ones_like(volume), volume)
    return _nan_where(flat, virial.to(work) / divisor.unsqueeze(-1).unsqueeze(-1)).to(dtype)


def pressure_from_stress(
    stress: torch.Tensor, pbc: torch.Tensor | None = None, *, convention: str
) -> torch.Tensor:
    """`P = −dE/dV = ∓tr σ / 3`: − for "ase" (ASE, MACE, UMA), + for "kups".

    Args:
        stress: `(B, 3, 3)` in eV/Å³.
        pbc: `(B, 3)` bool. The pressure is NaN for a system without a periodic axis.
        convention: That of `stress`, "ase" or "kups".

    Returns:
        `(B,)` in eV/Å³ (1 eV/Å³ = 160.21766208 GPa), positive under compression. The static part
        only: moving atoms add N k_B T / V.

    Raises:
        ValueError: If the shape is not as above, or the convention is unknown.
    """
    _check_matrices(stress, "stress")
    pressure = (-_stress_sign(convention) / 3.0) * stress.diagonal(dim1=1, dim2=2).sum(-1)
    if pbc is None:
        return pressure
    _check_pbc(pbc, stress)
    nan = torch.full_like(pressure, float("nan"))
    return torch.where(pbc.logical_not().all(-1), nan, pressure)


def centred(positions: torch.Tensor, batch: torch.Tensor, n_systems: int) -> torch.Tensor:
    """`r_b − (mean of r over the system of b)`, `(N, 3)`; systems may be empty."""
    zeros = torch.zeros((n_systems, 1), dtype=positions.dtype, device=positions.device)
    count = zeros.index_add(0, batch, torch.ones_like(positions.narrow(1, 0, 1)))
    total = zeros.repeat(1, 3).index_add(0, batch, positions)
    return positions - (total / count.clamp(min=1.0)).index_select(0, batch)


def _highest(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> torch.dtype:
    return torch.promote_types(
        torch.promote_types(a.dtype, b.dtype), torch.promote_types(c.dtype, d.dtype)
    )


def _force_moment(
    forces: torch.Tensor, positions: torch.Tensor, batch: torch.Tensor, n_systems: int
) -> torch.Tensor:
    """`Σ_{b∈s} r_b ⊗ F_b` about the mean position of each system, `(B, 3, 3)`."""
    outer = centred(positions, batch, n_systems).unsqueeze(2) * forces.unsqueeze(1)
    total = torch.zeros((n_systems, 3, 3), dtype=outer.dtype, device=outer.device)
    return total.index_add(0, batch, outer)


def _matmul3(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a @ b` of `(B, 3, 3)` matrices, without matrix units, which may reduce the precision."""
    return (a.unsqueeze(-1) * b.unsqueeze(1)).sum(2)


def _cross(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # torch.cross calls torch.linalg.cross.
    return a.roll([-1], [-1]) * b.roll([-2], [-1]) - a.roll([-2], [-1]) * b.roll([-1], [-1])


def _crosses(cell: torch.Tensor) -> torch.Tensor:
    """`[b×c, c×a, a×b]` of `[a, b, c]`."""
    return _cross(cell.roll([-1], [1]), cell.roll([-2], [1]))


def _determinant(cell: torch.Tensor, crosses: torch.Tensor) -> torch.Tensor:
    return (cell.select(1, 0) * crosses.select(1, 0)).sum(-1)


def _tolerance(cell: torch.Tensor) -> float:
    """The sine product |det h| / (|a||b||c|) below which a cell counts as flat.

    Depends on the precision of the given cell: rounding makes it 1e-7 for flat float32 cells.
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
    """Unit vectors; zero vectors are returned unchanged."""
    square = (vectors * vectors).sum(-1, keepdim=True)
    return vectors / torch.where(square > 0, square, torch.ones_like(square)).sqrt()


def _open_axes(cell: torch.Tensor, pbc: torch.Tensor | None) -> torch.Tensor:
    """Open axes, `(B, 3)`: those without periodicity or with a zero lattice vector."""
    zero = (cell == 0).all(-1)
    if pbc is None:
        return zero
    _check_pbc(pbc, cell)
    return zero | pbc.logical_not()


def _without_rows(is_open: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.where(is_open.unsqueeze(-1), torch.zeros_like(rows), rows)


def _completed(cell: torch.Tensor, is_open: torch.Tensor) -> torch.Tensor:
    """The cell with unit vectors along open axes, perpendicular to the others and each other."""
    cell = _without_rows(is_open, cell)
    n_open = is_open.sum(-1).unsqueeze(-1)
    identity = torch.eye(3, dtype=cell.dtype, device=cell.device)
    h = torch.where((n_open == 3).unsqueeze(-1), identity, cell)
    # One vector: the next row becomes its cross product with the axis farthest from it.
    only = cell.sum(1)
    normal = _unit(_cross(only, identity.index_select(0, only.abs().argmin(-1))))
    after = is_open.logical_not().roll([1], [1]) & (n_open == 2)
    h = torch.where(after.unsqueeze(-1), normal.unsqueeze(1), h)
    # Two vectors: the third row becomes their normal. If they are parallel, it is 0 and det = 0.
    missing = is_open & after.logical_not() & (n_open < 3)
    return torch.where(missing.unsqueeze(-1), _unit(_crosses(h)), h)


def _inverse_transpose(cell: torch.Tensor, tolerance: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`h⁻ᵀ = [b×c, c×a, a×b] / det`, `(B, 3, 3)`, and which systems are singular, `(B,)`."""
    crosses = _crosses(cell)
    determinant = _determinant(cell, crosses)
    singular = _is_singular(cell, determinant, tolerance)
    divisor = torch.where(singular, torch.ones_like(determinant), determinant)
    return crosses / divisor.unsqueeze(-1).unsqueeze(-1), singular


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


def _check_pbc(pbc: torch.Tensor, cell: torch.Tensor) -> None:
    if pbc.dim() != 2 or pbc.size(0) != cell.size(0) or pbc.size(1) != 3:
        raise ValueError(f"torchcall: pbc: expected ({cell.size(0)}, 3), got {_shape(pbc)}")


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
