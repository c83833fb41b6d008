"""The protocol and outputs of potentials; sums and multiples of potentials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from torchcall.mliap._state._patch import Patch, WithPatch, commit
from torchcall.mliap._table import SystemId, Table

State = TypeVar("State")
Gradients = TypeVar("Gradients", covariant=True)
Hessians = TypeVar("Hessians", covariant=True)
State_contra = TypeVar("State_contra", contravariant=True)
StatePatch = TypeVar("StatePatch", contravariant=True)


@jax.tree_util.register_static
@dataclass(frozen=True)
class EmptyType:
    """Placeholder for absent gradients or second derivatives; a pytree without leaves."""


EMPTY = EmptyType()


class PositionAndCell(NamedTuple):
    """Gradients with respect to positions and cell.

    Attributes:
        positions: (n, 3), ∂E/∂r in eV/Å, in the caller's order.
        cell: (b, 3, 3), ∂E/∂h in eV/Å at fixed Cartesian positions; rows are lattice vectors.
    """

    positions: Float[Array, "n 3"]
    cell: Float[Array, "b 3 3"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["total_energies", "gradients", "hessians"],
    meta_fields=[],
)
@dataclass(frozen=True)
class PotentialOut(Generic[Gradients, Hessians]):
    """Energies and derivatives. Outputs can be added, subtracted and multiplied by numbers.

    Attributes:
        total_energies: (b,) by system, in eV.
        gradients: (n, 3) ∂E/∂r in eV/Å, or `PositionAndCell`, or `EMPTY`.
        hessians: `EMPTY`, or a potential's second derivatives.
    """

    total_energies: Table[SystemId, Float[Array, " b"]]
    gradients: Gradients
    hessians: Hessians

    # Otherwise a NumPy scalar on the left would return an object array.
    __array_ufunc__ = None

    def __add__(self, other: PotentialOut[Any, Any]) -> PotentialOut[Gradients, Hessians]:
        return _combined(jnp.add, self, other)

    def __sub__(self, other: PotentialOut[Any, Any]) -> PotentialOut[Gradients, Hessians]:
        return _combined(jnp.subtract, self, other)

    def __mul__(self, factor: Any) -> PotentialOut[Gradients, Hessians]:
        return _combined(lambda x: factor * x, self)

    __rmul__ = __mul__


def _combined(function: Callable[..., Any], *terms: Any) -> PotentialOut[Any, Any]:
    parts = []
    for name in ("total_energies", "gradients", "hessians"):
        values = [getattr(term, name) for term in terms]
        structures = [_structure(value) for value in values]
        for structure in structures[1:]:
            if structure != structures[0]:
                raise ValueError(
                    f"torchcall: PotentialOut: {name}: expected the same structure in every term, "
                    f"{structures[0]}, got {structure}"
                )
        parts.append(jax.tree.map(function, *values))
    return PotentialOut(*parts)


def _structure(value: Any) -> Any:
    return jax.tree.structure(value), [jnp.shape(leaf) for leaf in jax.tree.leaves(value)]


class Potential(Protocol[State_contra, Gradients, Hessians, StatePatch]):
    """A potential energy as a function of a state and, optionally, a proposed change."""

    def __call__(
        self, state: State_contra, patch: StatePatch | None = None
    ) -> WithPatch[PotentialOut[Gradients, Hessians], Any]:
        """Energies and derivatives.

        Args:
            state: current state.
            patch: proposed change; the energies are then those of the state with the change made in
                every system.

        Returns:
            The output, and a patch that commits it and the proposed change in the accepted systems.
        """
        ...


@dataclass(frozen=True, eq=False)
class SummedPotential(Generic[State, Gradients, Hessians]):
    """`E = Σ E_k`, with derivatives.

    Attributes:
        potentials: the terms; their outputs have the same structure.
    """

    potentials: tuple[Potential[State, Gradients, Hessians, Patch[State]], ...]

    def __post_init__(self) -> None:
        if not self.potentials:
            raise ValueError("torchcall: SummedPotential: expected at least one potential")

    def __call__(
        self, state: State, patch: Patch[State] | None = None
    ) -> WithPatch[PotentialOut[Gradients, Hessians], Patch[State]]:
        """The sum of all outputs. The patch makes the change once and stores each term's output.

        Raises:
            ValueError: two outputs differ in structure.
        """
        results = [potential(state, patch) for potential in self.potentials]
        total = results[0].data
        for result in results[1:]:
            total = total + result.data
        return WithPatch(total, commit(patch, [result.patch for result in results]))


def sum_potentials(
    *potentials: Potential[State, Gradients, Hessians, Patch[State]],
) -> SummedPotential[State, Gradients, Hessians]:
    """`E = Σ E_k`.

    Raises:
        ValueError: no potential is given.
    """
    return SummedPotential(potentials)


@dataclass(frozen=True, eq=False)
class ScaledPotential(Generic[State, Gradients, Hessians]):
    """`E = scale · E₁`, with derivatives. The output that the term stores is not scaled.

    Attributes:
        potential: the term.
        scale: a number or a scalar array.
    """

    potential: Potential[State, Gradients, Hessians, Patch[State]]
    scale: Any

    def __post_init__(self) -> None:
        if jnp.shape(self.scale) != ():
            raise ValueError(
                f"torchcall: ScaledPotential: scale: expected a scalar, got {jnp.shape(self.scale)}"
            )

    def __call__(
        self, state: State, patch: Patch[State] | None = None
    ) -> WithPatch[PotentialOut[Gradients, Hessians], Patch[State]]:
        """The scaled output, and the term's patch."""
        result = self.potential(state, patch)
        return WithPatch(result.data * self.scale, commit(patch, [result.patch]))
