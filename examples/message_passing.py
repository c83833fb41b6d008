"""A small message-passing network as a TorchScript module, see `torchcall.mliap.TorchMliapForward`.

It has the typical parts of learned potentials: an embedding of atomic numbers, messages along
directed edges, division by distances, sums over systems. Its weights are random with a fixed seed:
for tests, benchmarks and examples, not for physics.

For an edge from j to i with distance r, unit vector u and envelope f(r),

    b_n(r) = sin(n π r / r_c) / r,    f(r) = exp(1 − 1 / (1 − r²/r_c²)) for r < r_c, else 0
    m_ij = (W h_j) ∘ MLP(b(r)) f(r)
    s_i = Σ_j m_ij,    v_i = Σ_j u m'_ij
    h_i ← h_i + MLP(s_i, |v_i|²),    h_i ← h_i / √(1 + ⟨h²⟩_system)

in each layer, with m' the second half of the message's channels. The energy of a system is the sum
of ε(Z_i) + MLP(h_i). It depends on distances and |v|² only, so it is invariant under translations,
rotations and reflections. f and all its derivatives vanish at the cutoff, so the energy is smooth.

The radial basis is that of J. Gasteiger, J. Groß and S. Günnemann, ICLR 2020,
https://arxiv.org/abs/2003.03123; the vector messages follow K. Schütt, O. Unke and M. Gastegger,
ICML 2021, https://arxiv.org/abs/2102.03150.

Run as a program, this file writes a TorchScript archive for
`torchcall.TorchModuleWrapper(file, requires_grad=True)`.
"""

import argparse
import math
from typing import Final

import torch


def perceptron(inputs: int, hidden: int, outputs: int) -> torch.nn.Sequential:
    """Linear, SiLU (smooth, for smooth energies), linear."""
    first, second = torch.nn.Linear(inputs, hidden), torch.nn.Linear(hidden, outputs)
    for linear in (first, second):
        torch.nn.init.kaiming_normal_(linear.weight)
    return torch.nn.Sequential(first, torch.nn.SiLU(), second)


class Layer(torch.nn.Module):
    """One round of messages, `h (N, F) → (N, F)`."""

    def __init__(self, features: int, basis: int) -> None:
        super().__init__()
        self.source = torch.nn.Linear(features, 2 * features, bias=False)
        self.filter = perceptron(basis, features, 2 * features)
        self.update = perceptron(2 * features, features, features)

    def forward(
        self,
        h: torch.Tensor,
        basis: torch.Tensor,
        envelope: torch.Tensor,
        unit: torch.Tensor,
        sender: torch.Tensor,
        receiver: torch.Tensor,
    ) -> torch.Tensor:
        weights = self.filter(basis) * envelope.unsqueeze(1)
        scalar, vector = (self.source(h).index_select(0, sender) * weights).chunk(2, dim=1)
        s = torch.zeros_like(h).index_add(0, receiver, scalar)
        v = torch.zeros(h.size(0), 3, h.size(1), dtype=h.dtype, device=h.device)
        v = v.index_add(0, receiver, unit.unsqueeze(2) * vector.unsqueeze(1))
        return h + self.update(torch.cat([s, (v * v).sum(1)], 1))


class MessagePassing(torch.nn.Module):
    """Energies and gradients of atoms of any elements, from an `AtomGraphInput`.

    It differentiates internally: needs `requires_grad=True` in `TorchModuleWrapper`. It computes in
    the precision of its weights (`.double()`), for inputs of any precision.

    Args:
        cutoff: Distance beyond which edges contribute nothing, in Å.
        features: Channels per atom.
        basis: Number of radial functions.
        layers: Number of message-passing layers.
        elements: Size of the embedding; larger than any atomic number.
        seed: Of the random weights; torch's global generator is not changed.
        cell_gradients: Whether to return `cell_gradients` too.
    """

    cell_gradients: Final[bool]
    frequency: torch.Tensor

    def __init__(
        self,
        cutoff: float = 5.0,
        *,
        features: int = 16,
        basis: int = 8,
        layers: int = 2,
        elements: int = 119,
        seed: int = 0,
        cell_gradients: bool = False,
    ) -> None:
        super().__init__()
        self.cutoff = float(cutoff)
        self.cell_gradients = cell_gradients
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = torch.nn.Embedding(elements, features)
            self.reference = torch.nn.Embedding(elements, 1)
            self.layers = torch.nn.ModuleList([Layer(features, basis) for _ in range(layers)])
            self.readout = perceptron(features, features, 1)
        frequency = torch.arange(1, basis + 1, dtype=torch.float64) * (math.pi / self.cutoff)
        self.register_buffer("frequency", frequency.to(torch.get_default_dtype()))
        # Otherwise autograd would record weight gradients in every call.
        self.requires_grad_(False)

    def energy(
        self,
        pos: torch.Tensor,
        cell: torch.Tensor,
        atomic_numbers: torch.Tensor,
        edge_index: torch.Tensor,
        cell_offsets: torch.Tensor,
        batch: torch.Tensor,
    ) -> torch.Tensor:
        """Energy of each system, `(B,)` in eV, differentiable in `pos` and `cell`."""
        sender, receiver = edge_index[0], edge_index[1]
        shift = cell_offsets.unsqueeze(2) * cell.index_select(0, batch.index_select(0, sender))
        vector = pos.index_select(0, receiver) - pos.index_select(0, sender) + shift.sum(1)
        r = (vector * vector).sum(1).sqrt()
        unit = vector / r.unsqueeze(1)

        # 1 / (1 − x²) has a pole at the cutoff, and 0 × ∞ would make gradients NaN: edges beyond it
        # get a finite value here, and zero below.
        inside = r < self.cutoff
        room = torch.where(inside, 1.0 - (r / self.cutoff).square(), torch.ones_like(r))
        envelope = torch.where(inside, torch.exp(1.0 - 1.0 / room), torch.zeros_like(r))
        basis = torch.sin(r.unsqueeze(1) * self.frequency) / r.unsqueeze(1)

        n_systems = cell.size(0)
        h = self.embedding(atomic_numbers)
        for layer in self.layers:
            h = layer(h, basis, envelope, unit, sender, receiver)
            h = h * self.system_scale(h, batch, n_systems).index_select(0, batch).unsqueeze(1)
        per_atom = (self.readout(h) + self.reference(atomic_numbers)).squeeze(1)
        total = torch.zeros(n_systems, dtype=per_atom.dtype, device=per_atom.device)
        return total.index_add(0, batch, per_atom)

    def system_scale(self, h: torch.Tensor, batch: torch.Tensor, n_systems: int) -> torch.Tensor:
        """`1 / √(1 + ⟨h²⟩)`, `(B,)`, with the mean over a system's atoms and channels."""
        square = h.square().mean(1)
        zeros = torch.zeros(n_systems, dtype=h.dtype, device=h.device)
        count = zeros.index_add(0, batch, torch.ones_like(square))
        # Systems may have no atoms.
        return (1.0 + zeros.index_add(0, batch, square) / count.clamp(min=1.0)).rsqrt()

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Evaluates the network.

        Args:
            input: `pos (N, 3)` and `cell (B, 3, 3)` in Å, `atomic_numbers (N,)` int64, `edge_index
                (2, E)` int64 with senders and receivers, the integer-valued `cell_offsets (E, 3)`,
                and `batch (N,)` int64. The edges are a full directed list.

        Returns:
            `energy (B,)` in eV, `position_gradients (N, 3)` = ∂E/∂r in eV/Å, and optionally
            `cell_gradients (B, 3, 3)` = ∂E/∂h in eV/Å at fixed Cartesian positions; rows are
            lattice vectors.
        """
        dtype = self.embedding.weight.dtype
        pos = input["pos"].detach().to(dtype).requires_grad_(True)
        cell = input["cell"].detach().to(dtype).requires_grad_(self.cell_gradients)
        energy = self.energy(
            pos,
            cell,
            input["atomic_numbers"],
            input["edge_index"],
            input["cell_offsets"].to(dtype),
            input["batch"],
        )
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
    """Writes the scripted network to a file."""
    parser = argparse.ArgumentParser(
        description="Write a random message-passing network as a TorchScript archive."
    )
    parser.add_argument("file", help="where to write, e.g. network.pt")
    parser.add_argument("--cutoff", type=float, default=5.0, help="Å (default: %(default)s)")
    parser.add_argument("--features", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--cell-gradients", action="store_true", help="return dE/dh too")
    options = parser.parse_args()
    module = MessagePassing(
        options.cutoff,
        features=options.features,
        layers=options.layers,
        seed=options.seed,
        cell_gradients=options.cell_gradients,
    )
    torch.jit.script(module.eval()).save(options.file)


if __name__ == "__main__":
    main()
