"""Patches: proposed changes of a state, accepted or rejected per system."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from torchcall.mliap._table import SystemId, Table, rows_of

State = TypeVar("State")
Data = TypeVar("Data", covariant=True)
PatchType = TypeVar("PatchType", covariant=True)
Accept = Table[SystemId, Bool[Array, " b"]]


class Patch(Protocol[State]):
    """A proposed change of a state: a function of the state and an acceptance table.

    A patch must leave rejected systems unchanged, bit by bit. To cross a `jit` boundary, it must be
    a pytree.
    """

    def __call__(self, state: State, accept: Accept, /) -> State:
        """The state with the change made in the accepted systems.

        Args:
            state: the state to change.
            accept: a bool per system.
        """
        ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class IdPatch(Generic[State]):
    """The patch that changes nothing."""

    def __call__(self, state: State, accept: Accept) -> State:
        """The unchanged state."""
        del accept
        return state


@partial(jax.tree_util.register_dataclass, data_fields=["patches"], meta_fields=[])
@dataclass(frozen=True)
class ComposedPatch(Generic[State]):
    """A sequence of patches.

    Attributes:
        patches: in the order of application.
    """

    patches: tuple[Patch[State], ...]

    def __call__(self, state: State, accept: Accept) -> State:
        """The state after all patches."""
        for patch in self.patches:
            state = patch(state, accept)
        return state


@partial(jax.tree_util.register_dataclass, data_fields=["proposal", "outputs"], meta_fields=[])
@dataclass(frozen=True)
class CommitPatch(Generic[State]):
    """A potential's patch for a proposal: makes the proposed change, then stores the outputs.

    Call it once, instead of the proposal. If the change was already made, call `outputs` only.

    Attributes:
        proposal: the patch given to the potential.
        outputs: the patch that stores the output in the state.
    """

    proposal: Patch[State]
    outputs: Patch[State]

    def __call__(self, state: State, accept: Accept) -> State:
        """The state with proposal and output in the accepted systems."""
        return self.outputs(self.proposal(state, accept), accept)


@partial(jax.tree_util.register_dataclass, data_fields=["data", "patch"], meta_fields=[])
@dataclass(frozen=True)
class WithPatch(Generic[Data, PatchType]):
    """A result and the patch that commits it.

    Attributes:
        data: the result.
        patch: call it with the state and the acceptance table.
    """

    data: Data
    patch: PatchType

    def map_data(self, function: Callable[[Any], Any]) -> WithPatch[Any, PatchType]:
        """Returns `function` of the data, with the same patch."""
        return replace(self, data=function(self.data))


def commit(proposal: Patch[Any] | None, outputs: list[Any]) -> Any:
    """Combines a proposal with patches that store outputs, and may already contain the proposal."""
    stores = [patch.outputs if isinstance(patch, CommitPatch) else patch for patch in outputs]
    stores = [patch for patch in stores if not isinstance(patch, IdPatch)]
    if not stores:
        store: Any = IdPatch()
    else:
        store = stores[0] if len(stores) == 1 else ComposedPatch(tuple(stores))
    return store if proposal is None else CommitPatch(proposal, store)


def all_systems(systems: Any, keys: tuple[Any, ...]) -> Any:
    """Acceptance of all systems, in the state's type of table."""
    yes = jnp.ones(len(keys), bool)
    return systems.set_data(yes) if hasattr(systems, "set_data") else Table(keys, yes)


def accepted(accept: Any, keys: tuple[Any, ...]) -> Bool[Array, " b"]:
    """The acceptance of the systems `keys`.

    Raises:
        TypeError: `accept` is not a table of booleans.
        ValueError: it lacks a system, or its shape differs from its number of keys.
    """
    if not (hasattr(accept, "keys") and hasattr(accept, "data")):
        raise TypeError(
            "torchcall: accept: expected a table of booleans by system, got "
            f"{type(accept).__name__}"
        )
    data = jnp.asarray(accept.data)
    if data.dtype != bool:
        raise TypeError(f"torchcall: accept: expected booleans, got {data.dtype}")
    if data.shape != (len(accept.keys),):
        raise ValueError(
            f"torchcall: accept: expected shape {(len(accept.keys),)}, got {data.shape}"
        )
    return data[rows_of(Table(keys, None).index, tuple(accept.keys), "accept")]
