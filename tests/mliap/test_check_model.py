"""`check_model` passes sound potentials and reports the flaw of each unsound one."""

import graphs
import numpy as np
import pytest
import reference
import torch
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall.mliap import TorchMliap, check_model


class Flawed(torch.nn.Module):
    """A pair potential with one chosen flaw."""

    def __init__(self, flaw: str, cutoff: float) -> None:
        super().__init__()
        self.flaw, self.cutoff = flaw, cutoff

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        pos = input["pos"].detach().requires_grad_(True)
        cell = input["cell"].detach().requires_grad_(True)
        i, j, batch = input["edge_index"][0], input["edge_index"][1], input["batch"]
        h = cell.transpose(1, 2) if self.flaw == "columns" else cell
        offsets = -input["cell_offsets"] if self.flaw == "direction" else input["cell_offsets"]
        r = pos[j] - pos[i] + (offsets.unsqueeze(1) @ h[batch[i]]).squeeze(1)
        if self.flaw == "anisotropic":
            r = r * torch.tensor([1.0, 1.0, 1.1], dtype=r.dtype)
        d = r.square().sum(1).sqrt()
        pair = (1.0 - (d / self.cutoff).clamp(max=1.0)).pow(4) / d
        per_atom = torch.zeros_like(pos[:, 0]).index_add(0, i, pair)
        if self.flaw == "position":
            per_atom = per_atom + 0.01 * pos[:, 0]
        if self.flaw == "order":
            per_atom = per_atom * torch.arange(1, pos.size(0) + 1, dtype=pos.dtype)
        if self.flaw == "batch mean":
            per_atom = per_atom - 0.1 * per_atom.mean()
        total = torch.zeros_like(cell[:, 0, 0]).index_add(0, batch, per_atom)
        g = torch.autograd.grad([total.sum()], [pos, cell])
        by_pos, by_cell = g[0], g[1]
        assert by_pos is not None
        assert by_cell is not None
        if self.flaw == "forces":
            by_pos = -by_pos
        if self.flaw == "virial":
            by_cell = cell.detach().transpose(1, 2) @ by_cell
        if self.flaw == "nan":
            by_pos = by_pos + torch.zeros_like(by_pos).log() * 0.0
        return {
            "energy": total.detach(),
            "position_gradients": by_pos,
            "cell_gradients": by_cell,
        }


FLAWS = {
    "nan": "finite",
    "forces": "position_gradients",
    "virial": "cell_gradients",
    "position": "translations",
    "order": "order",
    "batch mean": "batch",
    "anisotropic": "rotat",
    "columns": "periodic images",
    "direction": "periodic images",
}


@pytest.fixture
def graph():
    systems = reference.systems()
    return graphs.atom_graph([systems["triclinic"], systems["slab"]], slots=3)


@pytest.mark.usefixtures("x64")
def test_sound_potential_passes(graph):
    report = check_model(graphs.potential("message passing"), graph)
    assert report.ok, str(report)
    assert not report.failures
    assert len(report.findings) == 9


def test_sound_potential_passes_in_single_precision():
    module = reference.example("lennard_jones").LennardJones(**reference.LJ, cell_gradients=True)
    model = TorchMliap.from_module(graphs.script(module), CUTOFF, True, requires_grad=False)
    systems = reference.systems()
    graph = graphs.atom_graph([systems["triclinic"], systems["wire"]], dtype=np.float32)
    report = check_model(model, graph)
    assert report.ok, str(report)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("flaw", FLAWS)
def test_each_flaw_is_found_and_explained(graph, flaw):
    model = TorchMliap.from_module(graphs.script(Flawed(flaw, CUTOFF)), CUTOFF, True)
    report = check_model(model, graph)
    assert not report.ok
    failed = [finding for finding in report.failures if FLAWS[flaw] in finding.requirement]
    assert failed, str(report)
    text = str(report)
    assert "FAIL" in text
    assert failed[0].advice in text
    if flaw == "forces":
        assert failed[0].error == pytest.approx(2.0, rel=0.01)


@pytest.mark.usefixtures("x64")
def test_the_same_potential_without_a_flaw_passes(graph):
    model = TorchMliap.from_module(graphs.script(Flawed("", CUTOFF)), CUTOFF, True)
    report = check_model(model, graph)
    assert report.ok, str(report)
