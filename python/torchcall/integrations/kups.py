"""Potentials for kUPS (https://github.com/cusp-ai-oss/kups), which needs Python 3.12."""

# pyright: reportMissingImports=false
# kUPS is optional.

from typing import Any, NamedTuple

from jaxtyping import Array
from kups.core.data import Table
from kups.core.typing import SystemId
from kups.potential.mliap.torch import interface

from torchcall import mliap


def torch_mliap(model: mliap.TorchMliap) -> interface.TorchMliap:
    """A potential as kUPS' own `TorchMliap`, for `make_torch_mliap_from_state` and its driver.

    kUPS passes arrays of fixed size, with unused slots among the edges. They are removed here, so
    networks that torchcall loads need no knowledge of them.

    Args:
        model: the potential, with cell gradients, which kUPS always asks for.

    Raises:
        TypeError: it is no `TorchMliap` of torchcall.
        ValueError: it computes no cell gradients.
    """
    if not isinstance(model, mliap.TorchMliap):
        raise TypeError(
            f"torchcall: torch_mliap: model: expected a torchcall.mliap.TorchMliap, got a "
            f"{type(model).__name__}; torchcall.models.load makes one"
        )
    if not model.compute_cell_gradients:
        raise ValueError(
            "torchcall: torch_mliap: model: expected one with compute_cell_gradients=True, because "
            "kUPS always asks for them"
        )
    cutoff = Table((SystemId(0),), model.cutoff.data[:1])
    return interface.TorchMliap(cutoff, _Wrapper(model), compute_cell_gradients=True)


class _Wrapper:
    """Stands for kUPS' `TorchModuleWrapper`; compared by identity."""

    def __init__(self, model: mliap.TorchMliap) -> None:
        self.model = model

    def __call__(self, input: interface.AtomGraphInput) -> dict[str, Array]:
        atoms: Any = _Atoms(input["pos"], input["atomic_numbers"], input["batch"])
        boxes: Any = _Boxes(input["cell"], input["pbc"], input["charge"], input["spin"])
        edges: Any = _Edges(input["edge_index"].T, input["cell_offsets"][:, None])
        graph = mliap.TorchMliapInput(self.model, mliap.HyperGraph(atoms, boxes, edges))
        out = mliap.torch_mliap_model_fn(graph, compute_cell_gradients=True).data
        return {
            "energy": out.total_energies.data,
            "position_gradients": out.gradients.positions,
            "cell_gradients": out.gradients.cell,
        }


class _Atoms(NamedTuple):
    positions: Array
    atomic_numbers: Array
    system: Array


class _Boxes(NamedTuple):
    cell: Array
    pbc: Array
    charge: Array
    spin: Array


class _Edges(NamedTuple):
    indices: Array
    shifts: Array
