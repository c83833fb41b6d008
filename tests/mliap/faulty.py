"""A pair potential with one chosen fault, and what `check_model` must report of each."""

import torch


class Faulty(torch.nn.Module):
    """`Σ q_i q_j (1 − d/c)⁴ / d` over directed edges, with one fault at a time.

    An eager module: its fault can be exchanged between calls, so that all faults share a program.
    """

    species = (6, 14)

    def __init__(self, cutoff: float, fault: str = "") -> None:
        super().__init__()
        self.fault, self.cutoff = fault, cutoff
        self.charges = torch.zeros(119, dtype=torch.float64)
        self.charges[6], self.charges[14] = 0.8, 1.3

    def vectors(self, input, pos, cell):
        i, j, batch = input["edge_index"][0], input["edge_index"][1], input["batch"]
        offsets = input["cell_offsets"]
        if self.fault == "direction":
            offsets = -offsets
        if self.fault == "no offsets":
            offsets = 0 * offsets
        h = cell.transpose(1, 2) if self.fault == "columns" else cell
        r = pos[j] - pos[i] + (offsets.unsqueeze(1) @ h[batch[i]]).squeeze(1)
        if self.fault == "anisotropic":
            r = r * torch.tensor([1.0, 1.0, 1.1], dtype=r.dtype)
        return r

    def charge(self, numbers, dtype):
        if self.fault == "table of present elements":
            numbers = 6 + 8 * torch.unique(numbers, return_inverse=True)[1]
        if self.fault == "one element":
            numbers = torch.full_like(numbers, 6)
        return self.charges[numbers].to(dtype)

    def pair(self, d):
        x = 1.0 - (d / self.cutoff).clamp(max=1.0)
        if self.fault == "detached":
            return x.detach() * x.pow(3) / d
        if self.fault == "jump":
            return (x > 0) * 0.3 / d
        if self.fault == "kink":
            return x / d
        return x.pow(4) / d

    def per_atom(self, input, pos, cell):
        i, j = input["edge_index"][0], input["edge_index"][1]
        r = self.vectors(input, pos, cell)
        q = self.charge(input["atomic_numbers"], pos.dtype)
        energy = self.pair(r.square().sum(1).sqrt()) * q[i] * q[j]
        return torch.zeros_like(pos[:, 0]).index_add(0, i, energy)

    def energy(self, input, pos, cell):
        if self.fault == "single precision":
            pos, cell = pos.float(), cell.float()
            input = input | {"cell_offsets": input["cell_offsets"].float()}
        if self.fault == "half precision":
            pos, cell = pos.bfloat16(), cell.bfloat16()
            input = input | {"cell_offsets": input["cell_offsets"].bfloat16()}
        per_atom = self.per_atom(input, pos, cell)
        if self.fault == "position":
            per_atom = per_atom + 0.01 * pos[:, 0]
        if self.fault == "order":
            per_atom = per_atom * torch.arange(1, pos.size(0) + 1, dtype=pos.dtype)
        if self.fault == "batch mean":
            per_atom = per_atom - 0.1 * per_atom.mean()
        if self.fault == "edge count":
            per_atom = per_atom + 0.001 * input["edge_index"].shape[1]
        if self.fault == "random":
            per_atom = per_atom * (1 + 0.01 * torch.rand(()))
        total = torch.zeros_like(cell[:, 0, 0]).index_add(0, input["batch"], per_atom)
        return total.to(input["pos"].dtype)

    def forward(self, input):
        pos = input["pos"].detach().requires_grad_(True)
        cell = input["cell"].detach().requires_grad_(True)
        with torch.enable_grad():
            total = self.energy(input, pos, cell)
            by_pos, by_cell = torch.autograd.grad([total.sum()], [pos, cell])
        batch, h = input["batch"], cell.detach()
        moment = torch.zeros_like(by_cell)
        outer = pos.detach().unsqueeze(2) * by_pos.unsqueeze(1)
        moment = moment.index_add(0, batch, outer)
        virial = h.transpose(1, 2) @ by_cell + moment
        inverse = torch.linalg.pinv(h)
        volume = torch.linalg.det(h).abs()[:, None, None].clamp(min=1.0)
        by_cell = {
            "transposed": by_cell.transpose(1, 2),
            "virial": virial,
            "negative virial": -virial,
            "stress": virial / volume,
            "cell virial": h.transpose(1, 2) @ by_cell,
            "fixed fractional": by_cell + inverse.transpose(1, 2) @ moment,
            "no cell gradients": 0 * by_cell,
            "negative cell gradients": -by_cell,
            "wrapped cell gradients": by_cell + self.images(input, inverse, by_pos),
        }.get(self.fault, by_cell)
        factors = {"forces": -1.0, "twice": 2.0, "half": 0.5, "Hartree": 1 / 27.211386, "zero": 0.0}
        by_pos = by_pos * factors.get(self.fault, 1.0)
        if self.fault == "nan":
            by_pos = by_pos + torch.zeros_like(by_pos).log() * 0.0
        return {
            "energy": total.detach(),
            "position_gradients": by_pos,
            "cell_gradients": by_cell,
        }

    @staticmethod
    def images(input, inverse, by_pos):
        """Gradients as if atoms that lie outside the cell were inside."""
        batch = input["batch"]
        n = torch.round((input["pos"].unsqueeze(1) @ inverse[batch]).squeeze(1))
        outer = n.unsqueeze(2) * by_pos.unsqueeze(1)
        return torch.zeros_like(input["cell"]).index_add(0, batch, outer)


PRECISION = {
    ("single precision", "float64"): ("precision of float64", "computes in float32"),
    ("half precision", "float64"): ("position_gradients are", "float16 or bfloat16"),
    ("half precision", "float32"): ("precision of float32", "bfloat16"),
}
POSITIONS = "position_gradients are"
CELL = "cell_gradients are"
# Fault: a part of the requirement that must fail, and a part of its advice.
FAULTS = {
    "nan": ("finite", "divisions"),
    "forces": (POSITIONS, "forces were returned"),
    "twice": (POSITIONS, "counted twice"),
    "half": (POSITIONS, "counted once"),
    "Hartree": (POSITIONS, "Hartree and eV are mixed"),
    "zero": (POSITIONS, "They vanish"),
    "detached": (POSITIONS, "detached tensor"),
    "transposed": (CELL, "transposed"),
    "virial": (CELL, "the virial dE/dε"),
    "negative virial": (CELL, "the virial -dE/dε"),
    "stress": (CELL, "a stress of the convention dE/dε / V"),
    "cell virial": (CELL, "hᵀ ∂E/∂h"),
    "fixed fractional": (CELL, "fixed fractional coordinates"),
    "no cell gradients": (CELL, "They vanish"),
    "negative cell gradients": (CELL, "opposite sign"),
    "wrapped cell gradients": ("periodic images", "If only cell gradients differ"),
    "no offsets": ("periodic images", "without offsets"),
    "columns": ("periodic images", "columns"),
    "direction": ("periodic images", "swapped ends"),
    "position": ("translations", "differences"),
    "anisotropic": ("rotations", "Angular momentum"),
    "order": ("order of atoms", "atoms' axis"),
    "edge count": ("padded atoms", "sums or means"),
    "batch mean": ("batch do not interact", "normalisations"),
    "random": ("same input", "dropout"),
    "jump": ("vanishes at the cutoff", "envelope"),
    "kink": ("vanishes at the cutoff", "envelope"),
    "table of present elements": ("batch do not interact", "elements that are present"),
    "one element": ("declares differ", "not used"),
}
