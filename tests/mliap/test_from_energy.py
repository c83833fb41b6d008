"""Potentials made from modules that return energies only, in every engine."""

import graphs
import numpy as np
import pytest
import reference
import torch
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall.mliap import TorchMliap, edge_vectors, energy_and_gradients, with_gradients

pytestmark = pytest.mark.usefixtures("x64")


class Pairs(torch.nn.Module):
    """Energies of the Lennard-Jones example, by its pair function only."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs = reference.example("lennard_jones").LennardJones(**reference.LJ)
        self.cutoff = CUTOFF
        self.species = [6, 14]

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        r = edge_vectors(input)
        system = input["batch"].index_select(0, input["edge_index"][0])
        energy, _ = self.pairs.pair((r * r).sum(1))
        return torch.zeros_like(input["charge"]).index_add(0, system, energy)


@pytest.fixture(scope="module")
def members():
    kinds = reference.systems()
    return [kinds[name] for name in ("triclinic", "slab", "wire", "molecule")]


@pytest.mark.parametrize("engine", ["eager", "script"])
def test_gradients_equal_those_of_the_module_with_formulas(engine, members):
    model = TorchMliap.from_energy(Pairs(), engine=engine)
    graph = graphs.atom_graph(members, slots=5)
    found = energy_and_gradients(model, graph)
    expected = energy_and_gradients(graphs.potential("Lennard-Jones"), graph)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * abs(want).max())
    assert model.species == (6, 14)
    assert float(model.cutoff.data[0]) == CUTOFF


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("packages")


@pytest.mark.slow
def test_package(members, folder, monkeypatch):
    monkeypatch.setenv("TORCHCALL_CACHE", str(folder))
    model = TorchMliap.from_energy(Pairs(), dtype="float64", engine="package")
    graph = graphs.atom_graph(members, slots=5)
    found = energy_and_gradients(model, graph)
    expected = energy_and_gradients(graphs.potential("Lennard-Jones"), graph)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * abs(want).max())
    assert model.species == (6, 14)
    assert len(list(folder.iterdir())) == 1


class InDict(Pairs):
    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"energy": edge_vectors(input).sum(1)}


def test_dict_scripts():
    torch.jit.script(with_gradients(InDict()))
