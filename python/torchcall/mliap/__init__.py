"""Machine-learned interatomic potentials in JAX programs."""

from torchcall import _loaded as _loaded  # first: reports what is missing
from torchcall.mliap._adapters import (
    EdgeArrays,
    Geometry,
    edges_from_jax_md,
    edges_from_nvalchemi,
    edges_from_pairs,
    geometry_from_ase,
)
from torchcall.mliap._check import CheckReport, check_model
from torchcall.mliap._chunks import RunError, run_chunks
from torchcall.mliap._committee import CommitteeOut, committee, committee_statistics
from torchcall.mliap._compile import compile
from torchcall.mliap._energy import EnergyAndGradients, energy, energy_and_gradients
from torchcall.mliap._energy_torch import edge_vectors, with_gradients
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._input import AtomGraphInput
from torchcall.mliap._lattice_jax import (
    lattice_gradient_from_virial_jax,
    pressure_from_stress_jax,
    stress_from_virial_jax,
    virial_from_lattice_gradient_jax,
)
from torchcall.mliap._lattice_torch import (
    lattice_gradient_from_virial,
    pressure_from_stress,
    stress_from_virial,
    virial_from_lattice_gradient,
)
from torchcall.mliap._model import TorchMliap, TorchMliapForward
from torchcall.mliap._neighbors.allocate import NeighborListFn, neighbor_list
from torchcall.mliap._neighbors.neighbor_list import NeighborList
from torchcall.mliap._padding import PaddingMasks, pad_graph
from torchcall.mliap._state import (
    EMPTY,
    CachedOut,
    ComposedPatch,
    Edges,
    EmptyType,
    HasAtomicNumbers,
    HasCell,
    HyperGraph,
    IdPatch,
    IsNeighborList,
    IsRadiusGraphPoints,
    IsTorchMliapParticles,
    IsTorchMliapState,
    Lens,
    Patch,
    PositionAndCell,
    Potential,
    PotentialOut,
    ScaledPotential,
    SummedPotential,
    TorchMliapInput,
    View,
    WithPatch,
    empty_cache,
    lens,
    make_torch_mliap_from_state,
    make_torch_mliap_potential,
    sum_potentials,
    torch_mliap_model_fn,
)
from torchcall.mliap._table import Index, ParticleId, SystemId, Table

__all__ = [
    "EMPTY",
    "AtomGraph",
    "AtomGraphInput",
    "CachedOut",
    "CheckReport",
    "CommitteeOut",
    "ComposedPatch",
    "EdgeArrays",
    "Edges",
    "EmptyType",
    "EnergyAndGradients",
    "Geometry",
    "HasAtomicNumbers",
    "HasCell",
    "HyperGraph",
    "IdPatch",
    "Index",
    "IsNeighborList",
    "IsRadiusGraphPoints",
    "IsTorchMliapParticles",
    "IsTorchMliapState",
    "Lens",
    "NeighborList",
    "NeighborListFn",
    "PaddingMasks",
    "ParticleId",
    "Patch",
    "PositionAndCell",
    "Potential",
    "PotentialOut",
    "RunError",
    "ScaledPotential",
    "SummedPotential",
    "SystemId",
    "Table",
    "TorchMliap",
    "TorchMliapForward",
    "TorchMliapInput",
    "View",
    "WithPatch",
    "check_model",
    "committee",
    "committee_statistics",
    "compile",
    "edge_vectors",
    "edges_from_jax_md",
    "edges_from_nvalchemi",
    "edges_from_pairs",
    "empty_cache",
    "energy",
    "energy_and_gradients",
    "geometry_from_ase",
    "lattice_gradient_from_virial",
    "lattice_gradient_from_virial_jax",
    "lens",
    "make_torch_mliap_from_state",
    "make_torch_mliap_potential",
    "neighbor_list",
    "pad_graph",
    "pressure_from_stress",
    "pressure_from_stress_jax",
    "run_chunks",
    "stress_from_virial",
    "stress_from_virial_jax",
    "sum_potentials",
    "torch_mliap_model_fn",
    "virial_from_lattice_gradient",
    "virial_from_lattice_gradient_jax",
    "with_gradients",
]
