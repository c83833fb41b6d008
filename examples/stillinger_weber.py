"""Stillinger–Weber silicon as a TorchScript module, see `torchcall.mliap.TorchMliapForward`.

With distances in units of σ and energies in units of ε,

    E = Σ_{i<j} φ₂(r_ij) + Σ_i Σ_{j<k} φ₃(i; j, k)
    φ₂(r) = A (B r⁻ᵖ − r⁻ᑫ) exp(1 / (r − a))
    φ₃(i; j, k) = λ w(r_ij) w(r_ik) (cos θ_jik − cos θ₀)²,    w(r) = exp(γ / (r − a))

and both are zero for r ≥ a, where all their derivatives vanish. F. H. Stillinger and T. A. Weber,
Phys. Rev. B 31, 5262 (1985), https://doi.org/10.1103/PhysRevB.31.5262, with p = 4, q = 0,
cos θ₀ = −1/3.

Triplets are not enumerated. With u the unit vector of an edge and w its weight, the moments

    S = Σ_j w_j,    V = Σ_j w_j u_j,    T = Σ_j w_j u_j ⊗ u_j

of an atom give the sum over all its pairs of edges, since u_j · u_k = cos θ_jik:

    Σ_{j,k} w_j w_k (u_j · u_k − c)² = T : T − 2 c V · V + c² S².

The sum over j < k is half of that without the terms j = k, which are w_j² (1 − c)². The cost is
linear in the number of edges, and shapes depend only on the numbers of atoms and edges.

Run as a program, this file writes a TorchScript archive for
`torchcall.TorchModuleWrapper(file, requires_grad=True)`.
"""

import argparse
from typing import Final

import torch


class StillingerWeber(torch.nn.Module):
    """Energies and gradients of silicon, from an `AtomGraphInput`; atomic numbers are ignored.

    It differentiates internally: needs `requires_grad=True` in `TorchModuleWrapper`. The neighbour
    list's cutoff must be at least `cutoff` = a σ = 3.77 Å.

    Args:
        epsilon: ε, in eV.
        sigma: σ, in Å.
        cell_gradients: Whether to return `cell_gradients` too.
    """

    cell_gradients: Final[bool]

    # The parameters of the paper.
    A: Final[float] = 7.049556277
    B: Final[float] = 0.6022245584
    a: Final[float] = 1.80
    lambda_: Final[float] = 21.0
    gamma: Final[float] = 1.20
    cos0: Final[float] = -1.0 / 3.0

    def __init__(
        self, epsilon: float = 2.1683, sigma: float = 2.0951, *, cell_gradients: bool = False
    ) -> None:
        super().__init__()
        self.epsilon = float(epsilon)
        self.sigma = float(sigma)
        self.cutoff = self.a * self.sigma
        self.cell_gradients = cell_gradients

    def energy(
        self,
        pos: torch.Tensor,
        cell: torch.Tensor,
        edge_index: torch.Tensor,
        cell_offsets: torch.Tensor,
        batch: torch.Tensor,
    ) -> torch.Tensor:
        """Energy of each system, `(B,)` in eV, differentiable in `pos` and `cell`."""
        sender, receiver = edge_index[0], edge_index[1]
        shift = cell_offsets.unsqueeze(2) * cell.index_select(0, batch.index_select(0, sender))
        vector = pos.index_select(0, receiver) - pos.index_select(0, sender) + shift.sum(1)
        r = (vector * vector).sum(1).sqrt() / self.sigma

        # Both exponentials overflow at the cutoff, and 0 × ∞ would make gradients NaN: edges beyond
        # it get a finite distance here, and zero below.
        inside = r < self.a
        r = torch.where(inside, r, torch.full_like(r, 0.5 * self.a))
        zero = torch.zeros_like(r)
        pair = self.A * (self.B * r.pow(-4) - 1.0) * torch.exp(1.0 / (r - self.a))
        pair = torch.where(inside, pair, zero)
        w = torch.where(inside, torch.exp(self.gamma / (r - self.a)), zero)
        unit = vector / (vector * vector).sum(1, keepdim=True).sqrt()

        wu = w.unsqueeze(1) * unit
        outer = (wu.unsqueeze(2) * unit.unsqueeze(1)).reshape(-1, 9)
        # Columns: pair energy, then the moments S, Σ w², V, T.
        edges = torch.cat([torch.stack([pair, w, w * w], 1), wu, outer], 1)
        atoms = torch.zeros(pos.size(0), 15, dtype=pos.dtype, device=pos.device)
        atoms = atoms.index_add(0, sender, edges)
        S, W, V, T = atoms[:, 1], atoms[:, 2], atoms[:, 3:6], atoms[:, 6:]
        c = self.cos0
        square = (T * T).sum(1) - 2.0 * c * (V * V).sum(1) + c * c * S * S
        triplets = 0.5 * self.lambda_ * (square - (1.0 - c) ** 2 * W)

        per_atom = self.epsilon * (0.5 * atoms[:, 0] + triplets)
        total = torch.zeros(cell.size(0), dtype=pos.dtype, device=pos.device)
        return total.index_add(0, batch, per_atom)

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Evaluates the potential.

        Args:
            input: `pos (N, 3)` and `cell (B, 3, 3)` in Å, `edge_index (2, E)` int64 with senders
                and receivers, the integer-valued `cell_offsets (E, 3)`, and `batch (N,)` int64. The
                edges are a full directed list: with `(i, j, S)` comes `(j, i, −S)`.

        Returns:
            `energy (B,)` in eV, `position_gradients (N, 3)` = ∂E/∂r in eV/Å, and optionally
            `cell_gradients (B, 3, 3)` = ∂E/∂h in eV/Å at fixed Cartesian positions; rows are
            lattice vectors.
        """
        pos = input["pos"].detach().requires_grad_(True)
        cell = input["cell"].detach().requires_grad_(self.cell_gradients)
        energy = self.energy(pos, cell, input["edge_index"], input["cell_offsets"], input["batch"])
        gradients = torch.autograd.grad(
            [energy.sum()], [pos, cell] if self.cell_gradients else [pos]
        )
        result: dict[str, torch.Tensor] = {"energy": energy.detach()}
        position_gradients = gradients[0]
        assert position_gradients is not None
        result["position_gradients"] = position_gradients
        if self.cell_gradients:
            cell_gradients = gradients[1]
            assert cell_gradients is not None
            result["cell_gradients"] = cell_gradients
        return result


def main() -> None:
    """Writes the scripted module to a file."""
    parser = argparse.ArgumentParser(
        description="Write Stillinger-Weber silicon as a TorchScript archive."
    )
    parser.add_argument("file", help="where to write, e.g. silicon.pt")
    parser.add_argument("--epsilon", type=float, default=2.1683, help="eV (default: %(default)s)")
    parser.add_argument("--sigma", type=float, default=2.0951, help="Å (default: %(default)s)")
    parser.add_argument("--cell-gradients", action="store_true", help="return dE/dh too")
    options = parser.parse_args()
    module = StillingerWeber(options.epsilon, options.sigma, cell_gradients=options.cell_gradients)
    torch.jit.script(module.eval()).save(options.file)


if __name__ == "__main__":
    main()
