"""States, views, lenses and patches, and torch potentials over them."""

from ._cache import CachedOut
from ._graph import Edges, HyperGraph, TorchMliapInput
from ._lens import Lens, View, lens
from ._make import empty_cache, make_torch_mliap_from_state, make_torch_mliap_potential
from ._model_fn import torch_mliap_model_fn
from ._patch import ComposedPatch, IdPatch, Patch, WithPatch
from ._potential import (
    EMPTY,
    EmptyType,
    PositionAndCell,
    Potential,
    PotentialOut,
    ScaledPotential,
    SummedPotential,
    sum_potentials,
)
from ._protocols import (
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
