"""States, views, lenses and patches, and torch potentials over them."""

from torchcall.mliap._edges import Edges
from torchcall.mliap._state._cache import CachedOut
from torchcall.mliap._state._graph import HyperGraph, TorchMliapInput
from torchcall.mliap._state._lens import Lens, View, lens
from torchcall.mliap._state._make import (
    empty_cache,
    make_torch_mliap_from_state,
    make_torch_mliap_potential,
)
from torchcall.mliap._state._model_fn import torch_mliap_model_fn
from torchcall.mliap._state._patch import ComposedPatch, IdPatch, Patch, WithPatch
from torchcall.mliap._state._potential import (
    EMPTY,
    EmptyType,
    PositionAndCell,
    Potential,
    PotentialOut,
    ScaledPotential,
    SummedPotential,
    sum_potentials,
)
from torchcall.mliap._state._protocols import (
    HasAtomicNumbers,
    HasCell,
    IsNeighborList,
    IsRadiusGraphPoints,
    IsTorchMliapParticles,
    IsTorchMliapState,
)

__all__ = [
    "EMPTY",
    "CachedOut",
    "ComposedPatch",
    "Edges",
    "EmptyType",
    "HasAtomicNumbers",
    "HasCell",
    "HyperGraph",
    "IdPatch",
    "IsNeighborList",
    "IsRadiusGraphPoints",
    "IsTorchMliapParticles",
    "IsTorchMliapState",
    "Lens",
    "Patch",
    "PositionAndCell",
    "Potential",
    "PotentialOut",
    "ScaledPotential",
    "SummedPotential",
    "TorchMliapInput",
    "View",
    "WithPatch",
    "empty_cache",
    "lens",
    "make_torch_mliap_from_state",
    "make_torch_mliap_potential",
    "sum_potentials",
    "torch_mliap_model_fn",
]
