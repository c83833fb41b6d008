"""What states and their parts have to have; anything with these attributes will do."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from torchcall.mliap._model import TorchMliap
from torchcall.mliap._state._graph import Edges
from torchcall.mliap._table import Index, ParticleId, SystemId, Table


@runtime_checkable
class IsRadiusGraphPoints(Protocol):
    """Points between which a neighbour list draws edges.

    Attributes:
        positions: (n, 3), float32 or float64, in Å, wrapped or not.
        system: (n,), system of each point; entries out of range mark padding. Anything with `keys`
            and `indices`, or an integer array.
    """

    @property
    def positions(self) -> Float[Array, "n 3"]:
        """(n, 3), in Å."""
        ...

    @property
    def system(self) -> Index[SystemId] | Int[Array, " n"]:
        """(n,)."""
        ...


@runtime_checkable
class HasAtomicNumbers(Protocol):
    """Atoms.

    Attributes:
        atomic_numbers: (n,), integers.
    """

    @property
    def atomic_numbers(self) -> Int[Array, " n"]:
        """(n,)."""
        ...


@runtime_checkable
class IsTorchMliapParticles(IsRadiusGraphPoints, HasAtomicNumbers, Protocol):
    """Atoms of a torch potential: `positions`, `atomic_numbers` and `system`."""


@runtime_checkable
class HasCell(Protocol):
    """Systems.

    Attributes:
        cell: (b, 3, 3), rows are lattice vectors, in Å; or anything with such `vectors`.

    Where systems have them, these are read too:

    - `pbc`, (3,) or (b, 3) bool; else the cell's `periodic`; else every lattice vector that is not
      zero counts as periodic;
    - `charge` (b,), in e, and `spin` (b,); else 0.
    """

    @property
    def cell(self) -> Any:
        """(b, 3, 3), in Å."""
        ...


@runtime_checkable
class IsTorchMliapState(Protocol):
    """Everything that a torch potential needs.

    Attributes:
        particles: table of `IsTorchMliapParticles`, or these themselves.
        systems: table of `HasCell`, or these themselves.
        neighborlist: `(particles, systems, cutoffs) → Edges`; a `NeighborList` is one.
        torch_mliap_model: the potential.
    """

    @property
    def particles(self) -> Table[ParticleId, IsTorchMliapParticles] | IsTorchMliapParticles:
        """The atoms."""
        ...

    @property
    def systems(self) -> Table[SystemId, HasCell] | HasCell:
        """The systems."""
        ...

    @property
    def neighborlist(self) -> IsNeighborList:
        """What lists the edges."""
        ...

    @property
    def torch_mliap_model(self) -> TorchMliap:
        """The potential."""
        ...


@runtime_checkable
class IsNeighborList(Protocol):
    """What lists the edges of particles."""

    def __call__(self, particles: Any, systems: Any, cutoffs: Any, /) -> Edges:
        """All directed edges with `0 < |r| < cutoff`.

        Args:
            particles: as in the state.
            systems: as in the state.
            cutoffs: table by system, in Å; one entry serves every system.
        """
        ...
