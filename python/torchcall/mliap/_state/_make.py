"""Torch potentials over any state that has, or has views of, what they need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._state._cache import (
    CachedOut,
    StorePatch,
    check_cache,
    empty,
    inputs_of,
    known_systems,
    mark_of,
)
from torchcall.mliap._state._evaluation import Stored, evaluate
from torchcall.mliap._state._graph import HyperGraph, atom_graph, system_rows
from torchcall.mliap._state._lens import Lens, View
from torchcall.mliap._state._model_fn import checked_model, packaged, unpacked, unsure
from torchcall.mliap._state._neighbors import call_neighborlist
from torchcall.mliap._state._patch import IdPatch, Patch, WithPatch, all_systems, commit
from torchcall.mliap._state._potential import (
    EmptyType,
    Gradients,
    PositionAndCell,
    Potential,
    PotentialOut,
)
from torchcall.mliap._state._protocols import (
    HasCell,
    IsNeighborList,
    IsTorchMliapParticles,
    IsTorchMliapState,
)
from torchcall.mliap._state._written import Written, limited, natural
from torchcall.mliap._table import ParticleId, SystemId, Table

State = TypeVar("State")
P = TypeVar("P", bound=IsTorchMliapParticles)
S = TypeVar("S", bound=HasCell)
NNList = TypeVar("NNList", bound=IsNeighborList)


@dataclass(frozen=True, eq=False)
class TorchMliapPotential(Potential[State, Gradients, EmptyType, Patch[State]]):
    """What `make_torch_mliap_potential` returns; see there.

    Attributes:
        particles_view, systems_view, neighborlist_view, model, cutoffs_view,
        compute_cell_gradients, patch_idx_view, out_cache_lens: as given.
    """

    particles_view: View[State, Any]
    systems_view: View[State, Any]
    neighborlist_view: View[State, Any]
    model: View[State, TorchMliap] | TorchMliap
    cutoffs_view: View[State, Any]
    compute_cell_gradients: bool
    patch_idx_view: View[State, Any] | None
    out_cache_lens: Lens[State, Any] | None

    def __post_init__(self) -> None:
        for name in ("particles_view", "systems_view", "neighborlist_view", "cutoffs_view"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"torchcall: {name}: expected a function of the state, "
                    f"got {type(getattr(self, name)).__name__}"
                )
        if not isinstance(self.compute_cell_gradients, bool):
            raise TypeError(
                "torchcall: compute_cell_gradients: expected True or False, "
                f"got {self.compute_cell_gradients!r}"
            )
        if self.patch_idx_view is not None and not callable(self.patch_idx_view):
            raise TypeError(
                "torchcall: patch_idx_view: expected a function of the state, "
                f"got {type(self.patch_idx_view).__name__}"
            )
        lens = self.out_cache_lens
        if lens is not None and not (hasattr(lens, "get") and hasattr(lens, "set")):
            raise TypeError(
                "torchcall: out_cache_lens: expected a lens with get and set, "
                f"got {type(lens).__name__}"
            )
        if self.patch_idx_view is not None and lens is None:
            raise ValueError(
                "torchcall: patch_idx_view: expected an out_cache_lens with it, for it says what "
                "is written there; got None"
            )
        if isinstance(self.model, TorchMliap):
            self._check(self.model)
        elif not callable(self.model):
            raise TypeError(
                "torchcall: model: expected a torchcall.mliap.TorchMliap or a function of the "
                f"state, got {type(self.model).__name__}"
            )

    def __call__(
        self, state: State, patch: Patch[State] | None = None
    ) -> WithPatch[PotentialOut[Gradients, EmptyType], Patch[State]]:
        """Energies and gradients of a state, or of a state with a proposed change.

        Args:
            state: with what the views read.
            patch: proposed change, a pytree where the result leaves `jit`; the energies are those
                of the state with the change made in every system.

        Returns:
            The output, and the patch that makes the change and stores the output, both in the
            systems where it is accepted.

        Raises:
            TypeError, ValueError: as `torch_mliap_model_fn`; or the flags of model and potential
                differ, or the cache has another form. Before the model is called.
            NotImplementedError: as `torch_mliap_model_fn`.
        """
        proposed = state
        if patch is not None and not callable(patch):
            raise TypeError(
                "torchcall: patch: expected a function of a state and of what is accepted, got "
                f"{type(patch).__name__}"
            )
        if patch is not None:
            systems = self.systems_view(state)
            proposed = patch(state, all_systems(systems, system_rows(systems).keys))
        model, graph, unsafe, keys = self._read(proposed)
        if self.out_cache_lens is None:
            out = packaged(evaluate(model, graph, None, unsafe), keys, self.compute_cell_gradients)
            return WithPatch(out, commit(patch, [IdPatch()]))
        inputs, form, mark = inputs_of(graph), self._form(graph, keys), mark_of(model)
        cache = check_cache(self.out_cache_lens.get(proposed), form, inputs, mark)
        stored = None
        if isinstance(cache, CachedOut):
            held = unpacked(cache, self.compute_cell_gradients)
            stored = Stored(held, known_systems(cache, inputs))
        out = packaged(evaluate(model, graph, stored, unsafe), keys, self.compute_cell_gradients)
        kept = jax.lax.stop_gradient(out)
        if self.patch_idx_view is None:
            assert graph.batch is not None
            rows = natural(kept, graph.batch)
        else:
            rows = limited(kept, self.patch_idx_view(state))
        good = jnp.broadcast_to(~unsafe, (len(keys),))
        store = StorePatch(
            kept, inputs, good, Written(Table(keys, None), rows), self.out_cache_lens, mark
        )
        return WithPatch(out, commit(patch, [store]))

    def empty_cache(self, state: State) -> CachedOut[Gradients, EmptyType]:
        """See the function `empty_cache`."""
        model, graph, _, keys = self._read(state)
        return empty(graph, self._form(graph, keys), model)

    def _read(self, state: State) -> tuple[TorchMliap, AtomGraph, Any, tuple[Any, ...]]:
        model = self.model
        if not isinstance(model, TorchMliap):
            model = self._check(checked_model(model(state), "model"))
        particles, systems = self.particles_view(state), self.systems_view(state)
        cutoffs = self.cutoffs_view(state)
        listing = self.neighborlist_view(state)
        edges = call_neighborlist(listing, particles, systems, cutoffs)
        graph = HyperGraph(particles, systems, edges)
        return model, atom_graph(graph), unsure(graph, cutoffs, model), system_rows(systems).keys

    def _form(self, graph: AtomGraph, keys: tuple[Any, ...]) -> PotentialOut[Any, EmptyType]:
        """An output's shapes and dtypes, as arrays that nothing computes."""
        n, b, dtype = graph.positions.shape[0], graph.cell.shape[0], graph.positions.dtype
        positions, cell = jnp.zeros((n, 3), dtype), jnp.zeros((b, 3, 3), dtype)
        gradients: Any = PositionAndCell(positions, cell)
        if not self.compute_cell_gradients:
            gradients = positions
        return PotentialOut(Table(keys, jnp.zeros(b, dtype)), gradients, EmptyType())

    def _check(self, model: TorchMliap) -> TorchMliap:
        if model.compute_cell_gradients != self.compute_cell_gradients:
            raise ValueError(
                "torchcall: compute_cell_gradients: expected the same of potential and model, got "
                f"{self.compute_cell_gradients} and {model.compute_cell_gradients}; "
                "dataclasses.replace(model, compute_cell_gradients=…) changes the model's, where "
                "its module returns them"
            )
        return model


def empty_cache(
    potential: Potential[State, Any, EmptyType, Patch[State]], state: State
) -> CachedOut[Any, EmptyType]:
    """What the cache of a state has to hold before the first call, for shapes to stay in `scan`.

    Args:
        potential: from `make_torch_mliap_potential`.
        state: whose cache may hold anything.

    Returns:
        An output of NaN that belongs to no system. The model is not evaluated.

    Raises:
        TypeError: it is another potential. The terms of a sum have a cache each.
    """
    if not isinstance(potential, TorchMliapPotential):
        raise TypeError(
            "torchcall: empty_cache: potential: expected one of make_torch_mliap_potential, got "
            f"{type(potential).__name__}"
        )
    return potential.empty_cache(state)


@overload
def make_torch_mliap_potential(
    particles_view: View[State, Table[ParticleId, P]],
    systems_view: View[State, Table[SystemId, S]],
    neighborlist_view: View[State, NNList],
    model: View[State, TorchMliap] | TorchMliap,
    cutoffs_view: View[State, Table[SystemId, Array]],
    compute_cell_gradients: Literal[False] = False,
    patch_idx_view: View[State, PotentialOut[Array, EmptyType]] | None = None,
    out_cache_lens: Lens[State, PotentialOut[Array, EmptyType]] | None = None,
) -> Potential[State, Array, EmptyType, Patch[State]]: ...


@overload
def make_torch_mliap_potential(
    particles_view: View[State, Table[ParticleId, P]],
    systems_view: View[State, Table[SystemId, S]],
    neighborlist_view: View[State, NNList],
    model: View[State, TorchMliap] | TorchMliap,
    cutoffs_view: View[State, Table[SystemId, Array]],
    compute_cell_gradients: Literal[True],
    patch_idx_view: View[State, PotentialOut[PositionAndCell, EmptyType]] | None = None,
    out_cache_lens: Lens[State, PotentialOut[PositionAndCell, EmptyType]] | None = None,
) -> Potential[State, PositionAndCell, EmptyType, Patch[State]]: ...


def make_torch_mliap_potential(
    particles_view: Any,
    systems_view: Any,
    neighborlist_view: Any,
    model: Any,
    cutoffs_view: Any,
    compute_cell_gradients: Any = False,
    patch_idx_view: Any = None,
    out_cache_lens: Any = None,
) -> Any:
    """A torch model as a potential of a state: `potential(state, patch=None) → WithPatch`.

    Args:
        particles_view: state → table of particles: `positions` (n, 3) in Å, `atomic_numbers` (n,),
            `system` (n,).
        systems_view: state → table of systems: `cell` (b, 3, 3) in Å and, where there are,
            `pbc`, `charge`, `spin`.
        neighborlist_view: state → callable `(particles, systems, cutoffs) → Edges`, e.g. a
            `NeighborList`.
        model: the potential, or state → potential.
        cutoffs_view: state → table by system, in Å; equal to the model's.
        compute_cell_gradients: whether gradients are `PositionAndCell`, or (n, 3) of the positions
            alone; the same as the model's.
        patch_idx_view: state → an output with an `Index` of systems in place of each array, whose
            rows are written to the cache where their system is accepted; `EMPTY` in place of a part
            that never is, and out of range for such rows. Every row goes with its own system if
            None.
        out_cache_lens: where the state keeps the output of its current positions. Nothing is kept
            if None. `empty_cache(potential, state)` makes its first value; a plain output there is
            written, but never spares an evaluation.

    Returns:
        A function of the state; see `TorchMliapPotential.__call__`. It returns total energies by
        system in eV and gradients in eV/Å. Systems whose energy cannot be trusted have NaN: edges
        overflowed, or cutoffs inside `jit` are not the model's.

    Raises:
        ValueError: `compute_cell_gradients` differs from the model's. Where the model is a view,
            the first call raises it, before anything is evaluated.
        TypeError: an argument is of the wrong kind.
    """
    return TorchMliapPotential(
        particles_view,
        systems_view,
        neighborlist_view,
        model,
        cutoffs_view,
        compute_cell_gradients,
        patch_idx_view,
        out_cache_lens,
    )


@overload
def make_torch_mliap_from_state(
    state: View[State, IsTorchMliapState],
    *,
    compute_position_and_cell_gradients: Literal[False] = False,
) -> Potential[State, Array, EmptyType, Patch[State]]: ...


@overload
def make_torch_mliap_from_state(
    state: View[State, IsTorchMliapState],
    *,
    compute_position_and_cell_gradients: Literal[True],
) -> Potential[State, PositionAndCell, EmptyType, Patch[State]]: ...


def make_torch_mliap_from_state(
    state: Any, *, compute_position_and_cell_gradients: bool = False
) -> Any:
    """The potential of a state that has `particles`, `systems`, `neighborlist` and
    `torch_mliap_model`; edges reach as far as the model.

    Args:
        state: lens or view of an `IsTorchMliapState`.
        compute_position_and_cell_gradients: whether gradients are `PositionAndCell`, or (n, 3) of
            the positions alone; the same as the model's.

    Returns:
        As `make_torch_mliap_potential`, without a cache.

    Raises:
        TypeError: `state` is no view.
        ValueError: on the first call, before anything is evaluated, if the flag differs from that
            of the state's model.
    """
    view: View[Any, IsTorchMliapState] = state
    if not callable(state):
        raise TypeError(
            "torchcall: make_torch_mliap_from_state: state: expected a lens or a function of the "
            f"state, got {type(state).__name__}"
        )
    return TorchMliapPotential(
        lambda s: view(s).particles,
        lambda s: view(s).systems,
        lambda s: view(s).neighborlist,
        lambda s: view(s).torch_mliap_model,
        lambda s: view(s).torch_mliap_model.cutoff,
        compute_position_and_cell_gradients,
        None,
        None,
    )
