"""Patches: proposed changes of a state that are accepted or rejected system by system."""

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
    """A proposed change of a state: a function of the state and of what is accepted.

    A patch has to leave what belongs to rejected systems as it is, bit by bit. To go in or out of
    `jit`, it has to be a pytree.
    """

    def __call__(self, state: State, accept: Accept, /) -> State:
        """The state with the change made in the accepted systems.

        Args:
            state: to change.
            accept: by system, bool.
        """
        ...


@jax.tree_util.register_static
@dataclass(frozen=True)
class IdPatch(Generic[State]):
    """The patch that changes nothing."""

    def __call__(self, state: State, accept: Accept) -> State:
        """The state as it is."""
        del accept
        return state


@partial(jax.tree_util.register_dataclass, data_fields=["patches"], meta_fields=[])
@dataclass(frozen=True)
class ComposedPatch(Generic[State]):
    """Patches one after another.

    Attributes:
        patches: the first one first.
    """

    patches: tuple[Patch[State], ...]

    def __call__(self, state: State, accept: Accept) -> State:
        """The state after all of them."""
        for patch in self.patches:
            state = patch(state, accept)
        return state


@partial(jax.tree_util.register_dataclass, data_fields=["proposal", "outputs"], meta_fields=[])
@dataclass(frozen=True)
class CommitPatch(Generic[State]):
    """What a potential returns for a proposal: the proposal, then what stores the outputs.

    Call it once and instead of the proposal: it makes the proposed change itself. Where something
    else has made it already, call `outputs` alone.

    Attributes:
        proposal: the patch that the potential was asked about.
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
    """A result, and the patch that commits it.

    Attributes:
        data: the result.
        patch: to be called with the state and what is accepted.
    """

    data: Data
    patch: PatchType

    def map_data(self, function: Callable[[Any], Any]) -> WithPatch[Any, PatchType]:
        """`function` of the result, with the same patch."""
        return replace(self, data=function(self.data))


def commit(proposal: Patch[Any] | None, outputs: list[Any]) -> Any:
    """One patch from a proposal and the patches of outputs for it, which may hold it already."""
    stores = [patch.outputs if isinstance(patch, CommitPatch) else patch for patch in outputs]
    stores = [patch for patch in stores if not isinstance(patch, IdPatch)]
    if not stores:
        store: Any = IdPatch()
    else:
        store = stores[0] if len(stores) == 1 else ComposedPatch(tuple(stores))
    return store if proposal is None else CommitPatch(proposal, store)


def all_systems(systems: Any, keys: tuple[Any, ...]) -> Any:
    """Acceptance of every system, in the kind of table that the state has."""
    yes = jnp.ones(len(keys), bool)
    return systems.set_data(yes) if hasattr(systems, "set_data") else Table(keys, yes)


def accepted(accept: Any, keys: tuple[Any, ...]) -> Bool[Array, " b"]:
    """What is accepted of the systems `keys`.

    Raises:
        TypeError: `accept` is no table of booleans.
        ValueError: it lacks a system, or has not one entry for each of its keys.
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
