"""Layers of CHGNet on torchcall's graphs; see `torchcall.models.chgnet`.

`Any` stands for classes of the package `chgnet`. TorchScript reads the annotations: no
`from __future__ import annotations`.
"""

import math
from typing import Any, NamedTuple

import torch


class Lists(NamedTuple):
    """Bonds, which are edges shorter than the bond cutoff, and the angles between them.

    Attributes:
        edge: (K,) edge of each bond, sorted by sender.
        sender: (K,) atom of each bond.
        reverse: (K,) bond of the opposite direction.
        paired: (K, 1) 1, or 0 where by rounding the opposite direction is not below the cutoff.
        first, second: (A,) bonds of each ordered pair that has a sender in common.
        has_angles: (E, 1) whether there is an angle in the edge's system.
    """

    edge: torch.Tensor
    sender: torch.Tensor
    reverse: torch.Tensor
    paired: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    has_angles: torch.Tensor


def make_lists(input: dict[str, torch.Tensor], length: torch.Tensor, cutoff: float) -> Lists:
    edge_index, batch, offsets = input["edge_index"], input["batch"], input["cell_offsets"]
    edge = torch.nonzero(length < cutoff).squeeze(1)
    edge = edge.index_select(0, torch.argsort(edge_index[0].index_select(0, edge)))
    sender = edge_index[0].index_select(0, edge)
    receiver = edge_index[1].index_select(0, edge)
    count = torch.zeros_like(batch).index_add(0, sender, torch.ones_like(sender))
    start = count.cumsum(0) - count

    first, second = _rows(count.index_select(0, sender) - 1, start.index_select(0, sender))
    second = second + (second >= first).to(torch.int64)  # a bond makes no angle with itself

    bond, other = _rows(count.index_select(0, receiver), start.index_select(0, receiver))
    shift = offsets.index_select(0, edge)
    shift = shift.index_select(0, bond) + shift.index_select(0, other)
    ends = receiver.index_select(0, other) == sender.index_select(0, bond)
    opposite = (ends & (shift == 0).all(1)).to(torch.int64)
    none = torch.zeros_like(edge)
    paired = none.index_add(0, bond, opposite)
    reverse = none.index_add(0, bond, opposite * other)

    n_angles = torch.zeros_like(input["pbc"][:, 0], dtype=torch.int64)
    n_angles = n_angles.index_add(0, batch, count * (count - 1))
    of_edge = batch.index_select(0, edge_index[0])
    has_angles = (n_angles > 0).index_select(0, of_edge).unsqueeze(1)
    return Lists(edge, sender, reverse, paired.unsqueeze(1), first, second, has_angles)


def _rows(lengths: torch.Tensor, start: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists (i, start[i]), (i, start[i] + 1), …, (i, start[i] + lengths[i] - 1) for each i."""
    row = torch.repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    return row, torch.arange(row.shape[0], device=row.device) + (start - before)[row]


class _GatedMlp(torch.nn.Module):
    """act(norm(core(x))) * sigmoid(norm(gate(x))), where x is a concatenation of features.

    The first layer is split, one part per block of features: W [a, b] = W_a a + W_b b. Each part
    is applied before its features are gathered to edges or angles, so to fewer rows.
    """

    def __init__(self, gated: Any, widths: list[int]) -> None:
        super().__init__()
        core, gate = layers_of(gated.mlp_core), layers_of(gated.mlp_gate)
        weight = torch.cat([core[0].weight, gate[0].weight]).detach()
        self.parts = torch.nn.ModuleList()
        for columns in weight.split(widths, 1):
            part = torch.nn.Linear(columns.shape[1], columns.shape[0], bias=False)
            part.weight = torch.nn.Parameter(columns.clone(), requires_grad=False)
            self.parts.append(part)
        bias = torch.cat([core[0].bias, gate[0].bias]).detach()
        self.parts[0].bias = torch.nn.Parameter(bias, requires_grad=False)
        self.core = torch.nn.Sequential(*core[1:], gated.bn1 or torch.nn.Identity())
        self.gate = torch.nn.Sequential(*gate[1:], gated.bn2 or torch.nn.Identity())
        self.activation = gated.activation

    def forward(self, first_layer: torch.Tensor) -> torch.Tensor:
        core, gate = first_layer.chunk(2, 1)
        return self.activation(self.core(core)) * torch.sigmoid(self.gate(gate))


def layers_of(mlp: Any) -> list[Any]:
    """The layers of an MLP, without dropout, which has no effect in eval mode."""
    return [layer for layer in mlp.layers if not isinstance(layer, torch.nn.Dropout)]


class Radial(torch.nn.Module):
    """√(2/c) sin(f r / c) / r, times a polynomial of x = r / c that falls to zero at the cutoff c.

    CHGNet's polynomial is 1 - (p+1)(p+2)/2 x^p + p(p+2) x^(p+1) - p(p+1)/2 x^(p+2). Its sum loses
    digits near the cutoff: in float32 it makes most of the error of the forces. The same
    polynomial as a product is exact there: (1 - x)^3 Σ_k<p (k+1)(k+2)/2 x^k.
    """

    powers: torch.Tensor
    coefficients: torch.Tensor

    def __init__(self, basis: Any) -> None:
        super().__init__()
        self.frequencies = basis.frequencies
        self.scale, self.norm = float(basis.inv_cutoff), float(basis.norm_const)
        k = torch.arange(basis.smooth_cutoff.p, dtype=basis.frequencies.dtype)
        self.register_buffer("powers", k)
        self.register_buffer("coefficients", (k + 1) * (k + 2) / 2)

    def forward(self, length: torch.Tensor) -> torch.Tensor:
        length = length.unsqueeze(1)
        x = length * self.scale
        envelope = (1 - x).clamp(min=0) ** 3 * (x**self.powers @ self.coefficients).unsqueeze(1)
        return envelope * (self.norm * torch.sin(self.frequencies * x) / length)


class Angular(torch.nn.Module):
    """(1/√2, sin(f φ), cos(f φ)) / √π of an angle φ, from its cosine."""

    def __init__(self, fourier: Any) -> None:
        super().__init__()
        self.frequencies = fourier.frequencies
        self.constant = float(1 / torch.sqrt(torch.tensor(2)))  # rounded to float32, as in CHGNet

    def forward(self, cosine: torch.Tensor) -> torch.Tensor:
        # As in CHGNet, the factor avoids the infinite slope of acos at ±1.
        angle = torch.acos(cosine * (1 - 1e-6)).unsqueeze(1)
        waves = angle * self.frequencies
        constant = torch.full_like(angle, self.constant)
        return torch.cat([constant, waves.sin(), waves.cos()], 1) / math.sqrt(math.pi)


class AtomConv(torch.nn.Module):
    """Messages along edges; adds their sum to the features of the sender."""

    def __init__(self, layer: Any, widths: list[int]) -> None:
        super().__init__()
        self.gated = _GatedMlp(layer.twoBody_atom, widths)
        self.out = layers_of(layer.mlp_out)[0]

    def forward(
        self,
        atoms: torch.Tensor,
        edges: torch.Tensor,
        weights: torch.Tensor,
        edge_index: torch.Tensor,
    ) -> torch.Tensor:
        sender, receiver = edge_index[0], edge_index[1]
        parts = self.gated.parts
        first_layer = parts[0](atoms).index_select(0, sender) + parts[1](edges)
        first_layer = first_layer + parts[2](atoms).index_select(0, receiver)
        messages = self.gated(first_layer) * weights
        return atoms + self.out(torch.zeros_like(atoms).index_add(0, sender, messages))


class _AngleMlp(torch.nn.Module):
    """A gated MLP of an angle, its two bonds and the atom at its vertex."""

    def __init__(self, layer: Any, widths: list[int]) -> None:
        super().__init__()
        self.gated = _GatedMlp(layer.twoBody_bond, widths)

    def forward(
        self, atoms: torch.Tensor, bonds: torch.Tensor, angles: torch.Tensor, lists: Lists
    ) -> torch.Tensor:
        parts = self.gated.parts
        of_first = parts[0](bonds) + parts[3](atoms).index_select(0, lists.sender)
        first_layer = of_first.index_select(0, lists.first) + parts[2](angles)
        first_layer = first_layer + parts[1](bonds).index_select(0, lists.second)
        return self.gated(first_layer)


class _BondConv(torch.nn.Module):
    """Messages along angles; adds their sum to the features of the first bond, both directions."""

    def __init__(self, layer: Any, widths: list[int]) -> None:
        super().__init__()
        self.mlp = _AngleMlp(layer, widths)
        self.out = layers_of(layer.mlp_out)[0]

    def forward(
        self,
        atoms: torch.Tensor,
        edges: torch.Tensor,
        angles: torch.Tensor,
        weights: torch.Tensor,
        lists: Lists,
    ) -> torch.Tensor:
        bonds = edges.index_select(0, lists.edge)
        messages = self.mlp(atoms, bonds, angles, lists)
        messages = messages * weights.index_select(0, lists.second)
        total = weights * torch.zeros_like(bonds).index_add(0, lists.first, messages)
        total = total + lists.paired * total.index_select(0, lists.reverse)
        edges = edges.index_add(0, lists.edge, torch.nn.functional.linear(total, self.out.weight))
        bias = self.out.bias
        # CHGNet 0.2.0: all edges of a system that has angles, however long.
        return edges if bias is None else edges + bias * lists.has_angles


class Interaction(torch.nn.Module):
    """Updates the features of atoms, then of bonds, then of angles."""

    def __init__(
        self, atom_conv: Any, bond_conv: Any, angle_update: Any, a: int, b: int, c: int
    ) -> None:
        super().__init__()
        self.atom_conv = AtomConv(atom_conv, [a, b, a])
        self.bond_conv = _BondConv(bond_conv, [b, b, c, a])
        self.angle_update = None if angle_update is None else _AngleMlp(angle_update, [b, b, c, a])

    def forward(
        self,
        atoms: torch.Tensor,
        edges: torch.Tensor,
        angles: torch.Tensor,
        edge_weights: torch.Tensor,
        weights: torch.Tensor,
        edge_index: torch.Tensor,
        lists: Lists,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        atoms = self.atom_conv(atoms, edges, edge_weights, edge_index)
        edges = self.bond_conv(atoms, edges, angles, weights, lists)
        if self.angle_update is not None:
            bonds = edges.index_select(0, lists.edge)
            angles = angles + self.angle_update(atoms, bonds, angles, lists)
        return atoms, edges, angles
