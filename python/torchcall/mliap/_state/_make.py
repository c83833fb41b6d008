"""Torch potentials as functions of a simulation's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array

from torchcall._call.meshes import whole
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._rows import system_rows
from torchcall.mliap._state._cache import (
    CachedOut,
    StorePatch,
    check_cache,
    empty,
    inputs_of,
    known_systems,
    token_of,
)
from torchcall.mliap._state._evaluation import Stored, evaluate
from torchcall.mliap._state._graph import HyperGraph, atom_graph
from torchcall.mliap._state._lens import Lens, View
from torchcall.mliap._state._model_fn import checked_model, edges_incomplete, from_output, to_output
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
from torchcall.mliap._state._written import Written, rows_by_system, rows_by_view
from torchcall.mliap._table import ParticleId, SystemId, Table

State = TypeVar("State")
P = TypeVar("P", bound=IsTorchMliapParticles)
S = TypeVar("S", bound=HasCell)
NNList = TypeVar("NNList", bound=IsNeighborList)


@dataclass(frozen=True, eq=False)
class TorchMliapPotential(Potential[State, Gradients, EmptyType, Patch[State]]):
    """The result of `make_torch_mliap_potential`, with its arguments as attributes."""

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
                "torchcall: patch_idx_view: expected an out_cache_lens with it, got None; it "
                "selects the rows that are written to the cache"
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
            state: the state that the views read.
            patch: proposed change; a pytree if the result leaves `jit`. The energies are those of
                the state with the change made in every system.

        Returns:
            The output, and a patch that makes the change and stores the output in the accepted
            systems.

        Raises:
            TypeError, ValueError: as `torch_mliap_model_fn`; also if compute_cell_gradients differs
                between model and potential, or the cache has another structure. Raised before the
                model is called.
            NotImplementedError: as `torch_mliap_model_fn`.
        """
        proposed = state
        if patch is not None and not callable(patch):
            raise TypeError(
                "torchcall: patch: expected a function of a state and an acceptance table, got "
                f"{type(patch).__name__}"
            )
        if patch is not None:
            systems = self.systems_view(state)
            proposed = patch(state, all_systems(systems, system_rows(systems).keys))
        model, graph, incomplete, keys = self._read(proposed)
        with_cell = self.compute_cell_gradients
        if self.out_cache_lens is None:
            out = to_output(evaluate(model, graph, None, incomplete), keys, with_cell)
            return WithPatch(out, commit(patch, [IdPatch()]))
        inputs, like, token = inputs_of(graph), self._output_like(graph, keys), token_of(model)
        cache = check_cache(self.out_cache_lens.get(proposed), like, inputs, token)
        stored = None
        if isinstance(cache, CachedOut):
            stored = Stored(from_output(cache, with_cell), known_systems(cache, inputs))
        out = to_output(evaluate(model, graph, stored, incomplete), keys, with_cell)
        values = jax.lax.stop_gradient(out)
        if self.patch_idx_view is None:
            assert graph.batch is not None
            rows = rows_by_system(values, graph.batch)
        else:
            rows = rows_by_view(values, self.patch_idx_view(state))
        valid = jnp.broadcast_to(~incomplete, (len(keys),))
        store = StorePatch(
            values, inputs, valid, Written(Table(keys, None), rows), self.out_cache_lens, token
        )
        return WithPatch(out, commit(patch, [store]))

    def empty_cache(self, state: State) -> CachedOut[Gradients, EmptyType]:
        """See the function `empty_cache`."""
        model, graph, _, keys = self._read(state)
        return empty(graph, self._output_like(graph, keys), model)

    def _read(self, state: State) -> tuple[TorchMliap, AtomGraph, Any, tuple[Any, ...]]:
        state = whole(state)
        model = self.model
        if not isinstance(model, TorchMliap):
            model = self._check(checked_model(model(state), "model"))
        particles, systems = self.particles_view(state), self.systems_view(state)
        cutoffs = self.cutoffs_view(state)
        neighborlist = self.neighborlist_view(state)
        edges = call_neighborlist(neighborlist, particles, systems, cutoffs)
        graph = HyperGraph(particles, systems, edges)
        incomplete = edges_incomplete(graph, cutoffs, model)
        return model, atom_graph(graph), incomplete, system_rows(systems).keys

    def _output_like(self, graph: AtomGraph, keys: tuple[Any, ...]) -> PotentialOut[Any, EmptyType]:
        """Zeros with the output's shapes and dtypes."""
        n, b, dtype = graph.positions.shape[0], graph.cell.shape[0], graph.positions.dtype
        positions, cell = jnp.zeros((n, 3), dtype), jnp.zeros((b, 3, 3), dtype)
        gradients: Any = PositionAndCell(positions, cell)
        if not self.compute_cell_gradients:
            gradients = positions
        return PotentialOut(Table(keys, jnp.zeros(b, dtype)), gradients, EmptyType())

    def _check(self, model: TorchMliap) -> TorchMliap:
        if model.compute_cell_gradients != self.compute_cell_gradients:
            raise ValueError(
                "torchcall: compute_cell_gradients: expected the same value in potential and "
                f"model, got {self.compute_cell_gradients} and {model.compute_cell_gradients}; "
                "if the module returns cell gradients, use "
                "dataclasses.replace(model, compute_cell_gradients=True)"
            )
        return model


def empty_cache(
    potential: Potential[State, Any, EmptyType, Patch[State]], state: State
) -> CachedOut[Any, EmptyType]:
    """The initial cache of a state. With it, the state has the same structure in a whole `scan`.

    Args:
        potential: from `make_torch_mliap_potential`.
        state: the state; its cache may have any value.

    Returns:
        An output of NaN, invalid for all systems. The model is not evaluated.

    Raises:
        TypeError: the potential is of another kind. Each term of a sum has its own cache.
    """
    if not isinstance(potential, TorchMliapPotential):
        raise TypeError(
            "torchcall: empty_cache: potential: expected a result of make_torch_mliap_potential, "
            f"got {type(potential).__name__}"
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
        systems_view: state → table of systems: `cell` (b, 3, 3) in Å; optionally `pbc`, `charge`,
            `spin`.
        neighborlist_view: state → callable `(particles, systems, cutoffs) → Edges`, e.g. a
            `NeighborList`.
        model: the potential, or state → potential.
        cutoffs_view: state → table by system, in Å; equal to the model's.
        compute_cell_gradients: whether gradients are `PositionAndCell`, or (n, 3) for positions
            only; the same as the model's.
        patch_idx_view: state → an output with an `Index` of systems in place of each array. A row
            is written to the cache if its system is accepted; rows with an index out of range, and
            parts that are `EMPTY`, never are. None: each row belongs to its own system.
        out_cache_lens: the cache in the state, for the output at its current positions. None: no
            cache. `empty_cache(potential, state)` is its initial value. A plain output there is
            written, but never reused.

    Returns:
        A function of the state; see `TorchMliapPotential.__call__`. It returns total energies by
        system in eV and gradients in eV/Å. They are NaN if edges overflowed, or if cutoffs inside
        `jit` differ from the model's.

    Raises:
        ValueError: `compute_cell_gradients` differs from the model's. If the model is a view, the
            first call raises it, before the model is evaluated.
        TypeError: an argument has the wrong type.
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
    """The potential of a state with the attributes of `IsTorchMliapState`, at the model's cutoff.

    Args:
        state: lens or view of an `IsTorchMliapState`.
        compute_position_and_cell_gradients: whether gradients are `PositionAndCell`, or (n, 3) for
            positions only; the same as the model's.

    Returns:
        As `make_torch_mliap_potential`, without a cache.

    Raises:
        TypeError: `state` is not a view.
        ValueError: on the first call, before the model is evaluated, if the flag differs from the
            model's.
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
