"""One Lennard-Jones potential in each engine; its package is compiled once per session."""

import json
import os
import zipfile

import graphs
import pytest
import reference
import torch
from filelock import FileLock
from reference import CUTOFF
from torch._inductor import config as inductor

import torchcall
from torchcall.mliap import TorchMliap

ENGINES = ["TorchScript", "eager", "AOTInductor"]


class Energy(torch.nn.Module):
    """The Lennard-Jones energy alone; the package derives the gradients from it."""

    species = (6, 14)

    def __init__(self) -> None:
        super().__init__()
        self.pair = reference.potentials()["Lennard-Jones"]

    def forward(self, graph: dict[str, torch.Tensor]):
        index, cell = graph["edge_index"], graph["cell"]
        system = graph["batch"][index[0]]
        shifts = (graph["cell_offsets"].unsqueeze(2) * cell[system]).sum(1)
        vectors = graph["pos"][index[1]] - graph["pos"][index[0]] + shifts
        energy, _ = self.pair.pair((vectors * vectors).sum(1))
        return torch.zeros_like(graph["charge"]).index_add(0, system, energy)


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The potential's package: float64, dynamic shapes, with second derivatives.

    Shared by all test processes.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "lennard_jones.pt2"
    # The code around the kernels takes half of the time to compile.
    quick = inductor.patch({"aot_inductor.compile_wrapper_opt_level": "O0"})
    with FileLock(folder / "lennard_jones.lock"), pytest.MonkeyPatch.context() as patch, quick:
        if path.exists():
            return path
        patch.setenv("TORCHCALL_CACHE", str(folder / "cache"))
        example = reference.graph([reference.systems()["triclinic"]])
        return torchcall.mliap.compile(
            Energy(), path, example=example, cutoff=CUTOFF, dynamic=True, second_derivatives=True
        )


def potential(engine, package, **options):
    """The potential in one engine, with cell gradients."""
    if engine == "AOTInductor":
        return TorchMliap.from_package(package, **options)
    module = reference.potentials()["Lennard-Jones"]
    if engine == "TorchScript":
        module = graphs.script(module)
    return TorchMliap.from_module(module, CUTOFF, True, **options)


def capacity_of(own):
    """The capacities in a package's metadata, None where its shapes are free."""
    capacity = {name: axis["capacity"] for name, axis in own["axes"].items()}
    return None if set(capacity.values()) == {None} else capacity


def changed(package, path, **changes):
    """A copy of a package with changed metadata."""
    with zipfile.ZipFile(package) as source, zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("metadata.json"):
                fields = json.loads(content)
                own = json.loads(fields["torchcall"])
                for key, value in changes.items():
                    if key == "capacity":
                        for name, size in value.items():
                            own["axes"][name]["capacity"] = size
                    else:
                        places = (own, own["user"], fields)
                        next((p for p in places if key in p), fields)[key] = value
                content = json.dumps(fields | {"torchcall": json.dumps(own)}).encode()
            target.writestr(entry, content)
    return path
