"""A Lennard-Jones potential as a TorchScript module, see `torchcall.mliap.TorchMliapForward`.

With `u = r²` and `s = σ⁶/u³`, a pair's energy is

    φ(u) = 4 ε (s² − s) S(x),    x = clamp((u − r_on²) / (r_c² − r_on²), 0, 1),
    S(x) = 1 − 10 x³ + 15 x⁴ − 6 x⁵.

`S` and its first two derivatives are continuous at both ends, so the energy is C², and pairs at or
beyond the cutoff contribute exactly zero. The energy of a system is half the sum over its directed
edges.

Run as a program, this file writes a TorchScript archive for
`torchcall md --model FILE`.
"""

import argparse
from typing import Final

import torch


class LennardJones(torch.nn.Module):
    """Energies and gradients of Lennard-Jones atoms, from an `AtomGraphInput`.

    Args:
        epsilon: Depth of the well, in eV.
        sigma: Distance at which the unswitched energy vanishes, in Å.
        cutoff: Distance beyond which pairs contribute nothing, in Å.
        onset: Distance at which the switch starts, in Å; None means 0.9 × cutoff.
        cell_gradients: Whether to return `cell_gradients` too.
        autograd: Whether to differentiate with `torch.autograd.grad`, like most learned potentials,
            instead of analytically. Then it needs `requires_grad=True` in `TorchModuleWrapper`.

    Raises:
        ValueError: If not 0 <= onset < cutoff.
    """

    autograd: Final[bool]
    cell_gradients: Final[bool]

    def __init__(
        self,
        epsilon: float = 0.0104,
        sigma: float = 3.40,
        cutoff: float = 8.5,
        onset: float | None = None,
        *,
        cell_gradients: bool = False,
        autograd: bool = False,
    ) -> None:
        super().__init__()
        onset = 0.9 * cutoff if onset is None else onset
        if not 0.0 <= onset < cutoff:
            raise ValueError(f"onset: expected a distance in [0, cutoff = {cutoff}), got {onset}")
        self.epsilon = float(epsilon)
        self.sigma = float(sigma)
        self.cutoff = float(cutoff)
        self.onset = float(onset)
        self.cell_gradients = cell_gradients
        self.autograd = autograd

    def pair(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """½ φ(u) and its derivative by u = r². The half is because each pair has two edges."""
        width = self.cutoff * self.cutoff - self.onset * self.onset
        x = ((u - self.onset * self.onset) / width).clamp(0.0, 1.0)
        y = 1.0 / u
        s = (self.sigma**6) * (y * y * y)
        phi = (2.0 * self.epsilon) * (s * s - s)
        dphi = (2.0 * self.epsilon) * (3.0 * s - 6.0 * s * s) * y
        switch = 1.0 + x * x * x * (x * (15.0 - 6.0 * x) - 10.0)
        dswitch = x * (1.0 - x)
        dswitch = (-30.0 / width) * (dswitch * dswitch)
        return phi * switch, dphi * switch + phi * dswitch

    def shifts(
        self, offsets: torch.Tensor, cell: torch.Tensor, system: torch.Tensor
    ) -> torch.Tensor:
        """`offsets @ cell` of each edge, as `(3, E)`."""
        if cell.size(0) == 2:
            # One real and one phantom system: two products and a `where` are faster than gathering
            # 3 × 3 cells.
            both = cell.transpose(1, 2).reshape(6, 3) @ offsets.t()
            return torch.where(system == 0, both[:3], both[3:])
        cells = cell.reshape(-1, 9).t().index_select(1, system).view(3, 3, -1)
        return (offsets.t().unsqueeze(1) * cells).sum(0)

    def offset_moments(
        self, offsets: torch.Tensor, g: torch.Tensor, system: torch.Tensor, n_systems: int
    ) -> torch.Tensor:
        """`Σ offsets[k] g[l]` over each system's edges, as `(B, 3, 3)`."""
        if n_systems == 2:
            zero = torch.zeros_like(g)
            split = torch.cat(
                [torch.where(system == 0, g, zero), torch.where(system == 0, zero, g)]
            )
            return (split @ offsets).view(2, 3, 3).transpose(1, 2)
        outer = (offsets.t().unsqueeze(1) * g.unsqueeze(0)).reshape(9, -1)
        total = torch.zeros(9, n_systems, dtype=g.dtype, device=g.device)
        total = total.scatter_add_(1, system.unsqueeze(0).expand(9, -1), outer)
        return total.t().reshape(n_systems, 3, 3)

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
        pos, cell = input["pos"], input["cell"]
        sender, receiver = input["edge_index"][0], input["edge_index"][1]
        offsets, batch = input["cell_offsets"], input["batch"]
        if self.autograd:
            pos = pos.detach().requires_grad_(True)
            cell = cell.detach().requires_grad_(self.cell_gradients)

        # Layout (3, E): gathers, sums and scatters are fastest along the last axis.
        n_atoms, n_systems = pos.size(0), cell.size(0)
        x = pos.t().contiguous()
        r = x.index_select(1, receiver) - x.index_select(1, sender)
        system = batch.index_select(0, sender)
        r = r + self.shifts(offsets, cell, system)
        u = (r * r).sum(0)
        energy, slope = self.pair(u)

        # Sum by atom, then by system: short sums are more accurate in single precision.
        per_atom = torch.zeros(n_atoms, dtype=pos.dtype, device=pos.device).index_add(
            0, receiver, energy
        )
        total = torch.zeros(n_systems, dtype=pos.dtype, device=pos.device).index_add(
            0, batch, per_atom
        )
        result: dict[str, torch.Tensor] = {"energy": total.detach()}
        if self.autograd:
            gradients = torch.autograd.grad(
                [total.sum()], [pos, cell] if self.cell_gradients else [pos]
            )
            position_gradients = gradients[0]
            assert position_gradients is not None
            result["position_gradients"] = position_gradients
            if self.cell_gradients:
                cell_gradients = gradients[1]
                assert cell_gradients is not None
                result["cell_gradients"] = cell_gradients
            return result

        # g = ∂(½φ)/∂r of each edge. A full list has each pair in both directions, so an atom's
        # terms as a sender equal those as a receiver: scattering 2 g once gives its gradient.
        g = (2.0 * slope) * r
        sums = torch.zeros(3, n_atoms, dtype=pos.dtype, device=pos.device)
        sums = sums.scatter_add_(1, receiver.unsqueeze(0).expand(3, -1), g + g)
        result["position_gradients"] = sums.t().contiguous()
        if self.cell_gradients:
            # r = … + offsets @ cell, hence ∂E/∂h[k, l] = Σ offsets[k] g[l].
            result["cell_gradients"] = self.offset_moments(offsets, g, system, n_systems)
        return result


def main() -> None:
    """Writes the scripted module to a file."""
    parser = argparse.ArgumentParser(
        description="Write a Lennard-Jones potential as a TorchScript archive."
    )
    parser.add_argument("file", help="where to write, e.g. lj.pt")
    parser.add_argument(
        "--epsilon", type=float, default=0.0104, help="eV (default: %(default)s, argon)"
    )
    parser.add_argument("--sigma", type=float, default=3.40, help="Å (default: %(default)s, argon)")
    parser.add_argument("--cutoff", type=float, default=8.5, help="Å (default: %(default)s)")
    parser.add_argument("--onset", type=float, help="Å (default: 0.9 × cutoff)")
    options = parser.parse_args()
    module = LennardJones(
        options.epsilon, options.sigma, options.cutoff, options.onset, cell_gradients=True
    )
    torch.jit.script(module.eval()).save(options.file)


if __name__ == "__main__":
    main()
