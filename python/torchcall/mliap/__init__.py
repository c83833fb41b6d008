"""Machine-learned interatomic potentials in JAX programs."""

from ._adapters import Edges, Geometry, edges_from_jax_md, edges_from_pairs, geometry_from_ase
from ._check import CheckReport, check_model
from ._chunks import RunError, run_chunks
from ._energy import EnergyAndGradients, energy, energy_and_gradients
from ._graph import AtomGraph, PaddingMasks, pad_graph
from ._input import AtomGraphInput
from ._lattice_jax import (
    lattice_gradient_from_virial_jax,
    pressure_from_stress_jax,
    stress_from_virial_jax,
    virial_from_lattice_gradient_jax,
)
from ._lattice_torch import (
    lattice_gradient_from_virial,
    pressure_from_stress,
    stress_from_virial,
    virial_from_lattice_gradient,
)
from ._model import TorchMliap, TorchMliapForward
from ._neighbors import NeighborList, NeighborListFn, neighbor_list
from ._table import SystemId, Table

__all__ = [
    "AtomGraph",
    "AtomGraphInput",
    "CheckReport",
    "Edges",
    "EnergyAndGradients",
    "Geometry",
    "NeighborList",
    "NeighborListFn",
    "PaddingMasks",
    "RunError",
    "SystemId",
    "Table",
    "TorchMliap",
    "TorchMliapForward",
    "check_model",
    "edges_from_jax_md",
    "edges_from_pairs",
    "energy",
    "energy_and_gradients",
    "geometry_from_ase",
    "lattice_gradient_from_virial",
    "lattice_gradient_from_virial_jax",
    "neighbor_list",
    "pad_graph",
    "pressure_from_stress",
    "pressure_from_stress_jax",
    "run_chunks",
    "stress_from_virial",
    "stress_from_virial_jax",
    "virial_from_lattice_gradient",
    "virial_from_lattice_gradient_jax",
]
