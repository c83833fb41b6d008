"""Protocols of states and their parts."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float, Int

from torchcall.mliap._edges import Edges
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._table import Index, ParticleId, SystemId, Table


@runtime_checkable
class IsRadiusGraphPoints(Protocol):
    """The points of a neighbour list.

    Attributes:
        positions: (n, 3), float32 or float64, in Å, wrapped or not.
        system: (n,), system of each point; indices out of range mark padding. An object with `keys`
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
        cell: (b, 3, 3), rows are lattice vectors, in Å; or an object with such `vectors`.

    Optional attributes:

    - `pbc`, (3,) or (b, 3) bool; defaults to the cell's `periodic`, or to every non-zero lattice
      vector being periodic;
    - `charge` (b,) in e, and `spin` (b,); default to 0.
    """

    @property
    def cell(self) -> Any:
        """(b, 3, 3), in Å."""
        ...


@runtime_checkable
class IsTorchMliapState(Protocol):
    """The state of a torch potential.

    Attributes:
        particles: table of `IsTorchMliapParticles`, or such an object itself.
        systems: table of `HasCell`, or such an object itself.
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
        """The neighbour list."""
        ...

    @property
    def torch_mliap_model(self) -> TorchMliap:
        """The potential."""
        ...


@runtime_checkable
class IsNeighborList(Protocol):
    """A neighbour list: a function from particles and systems to edges."""

    def __call__(self, particles: Any, systems: Any, cutoffs: Any, /) -> Edges:
        """All directed edges with `|r| < cutoff` but `(i, i, 0)`.

        Args:
            particles: as in the state.
            systems: as in the state.
            cutoffs: table by system, in Å; one entry serves every system.
        """
        ...
