"""A cached output in the state, with the inputs it was computed from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._state._patch import Accept, accepted
from torchcall.mliap._state._potential import EMPTY, EmptyType, Gradients, Hessians, PotentialOut
from torchcall.mliap._state._written import Written, written_rows
from torchcall.mliap._table import Table


class Inputs(NamedTuple):
    """All inputs of a model; edges as two checksums per sender.

    Attributes:
        positions: (n, 3).
        atomic_numbers: (n,).
        system: (n,) int32.
        edges: (n, 2), order-independent hashes of receivers and shifts.
        cell: (b, 3, 3).
        pbc: (b, 3).
        charge: (b,).
        spin: (b,).
    """

    positions: Float[Array, "n 3"]
    atomic_numbers: Int[Array, " n"]
    system: Int[Array, " n"]
    edges: UInt32[Array, "n 2"]
    cell: Float[Array, "b 3 3"]
    pbc: Bool[Array, "b 3"]
    charge: Float[Array, " b"]
    spin: Float[Array, " b"]


class ModelToken:
    """Identifies a wrapper in a cache without retaining the model."""


_tokens: WeakKeyDictionary[Any, ModelToken] = WeakKeyDictionary()


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["total_energies", "gradients", "hessians", "inputs", "known"],
    meta_fields=["model"],
)
@dataclass(frozen=True)
class CachedOut(PotentialOut[Gradients, Hessians]):
    """A cached output with its inputs; a pytree.

    Attributes:
        inputs: the inputs that each row was computed from.
        known: (b,), whether the system's output is valid.
        model: token of the model, static.
    """

    inputs: Inputs
    known: Bool[Array, " b"]
    model: Any


def token_of(model: TorchMliap) -> Any:
    """The model's token, one per wrapper. Plain functions are their own token."""
    if not isinstance(model.wrapper, TorchModuleWrapper):
        return model.wrapper
    return _tokens.setdefault(model.wrapper, ModelToken())


def inputs_of(graph: AtomGraph) -> Inputs:
    """The model's inputs from a graph."""
    graph = lax.stop_gradient(graph)
    assert graph.batch is not None
    b, dtype = graph.cell.shape[0], graph.positions.dtype
    none = jnp.zeros(b, dtype)
    return Inputs(
        graph.positions,
        graph.atomic_numbers,
        graph.batch.astype(jnp.int32),
        _edge_sums(graph),
        graph.cell,
        graph.pbc,
        none if graph.charge is None else graph.charge,
        none if graph.spin is None else graph.spin,
    )


def empty(graph: AtomGraph, out: PotentialOut[Any, EmptyType], model: TorchMliap) -> CachedOut:
    """An empty cache for graphs and outputs of these shapes."""
    return _blank(out, jax.eval_shape(inputs_of, graph), token_of(model))


def _blank(out: PotentialOut[Any, Any], inputs: Any, token: Any) -> CachedOut[Any, Any]:
    nan = jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), out)
    b = inputs.cell.shape[0]
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
    # b marks atoms without a system.
    zeros = zeros._replace(system=jnp.full_like(zeros.system, b))
    return CachedOut(*_parts(nan), zeros, jnp.zeros(b, bool), token)


def known_systems(cache: CachedOut[Any, Any], inputs: Inputs) -> Bool[Array, " b"]:
    """Whether the cache is valid for each system: all its inputs have the same bits.

    An atom that moves between systems invalidates both.
    """
    old, b = cache.inputs, cache.known.shape[0]
    atoms = [_same_bits(getattr(old, name), getattr(inputs, name)) for name in _BY_ATOM]
    systems = [_same_bits(getattr(old, name), getattr(inputs, name)) for name in _BY_SYSTEM]
    changed = ~jnp.all(jnp.stack(atoms), axis=0)
    stale = _any_by_system(changed, old.system, b) | _any_by_system(changed, inputs.system, b)
    return cache.known & jnp.all(jnp.stack(systems), axis=0) & ~stale


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["out", "inputs", "valid", "written"],
    meta_fields=["lens", "model"],
)
@dataclass(frozen=True)
class StorePatch:
    """Stores an output in the state, in the rows of accepted systems.

    Attributes:
        out: the output.
        inputs: the inputs it was computed from.
        valid: (b,), whether the system's output may be reused.
        written: which rows to store.
        lens: the cache in the state, static.
        model: token of the model, static.
    """

    out: PotentialOut[Any, EmptyType]
    inputs: Inputs
    valid: Bool[Array, " b"]
    written: Written
    lens: Any
    model: Any

    def __call__(self, state: Any, accept: Accept) -> Any:
        """The state with the output stored.

        Raises:
            ValueError: the cache has another structure.
        """
        keys = self.out.total_energies.keys
        yes = accepted(accept, keys)
        old = check_cache(self.lens.get(state), self.out, self.inputs, self.model)
        if old is None:
            old = _blank(self.out, self.inputs, self.model)
        rows = written_rows(self.written, accept)
        parts = _parts(jax.tree.map(_select, rows, self.out, PotentialOut(*_parts(old))))
        if not isinstance(old, CachedOut):
            return self.lens.set(state, PotentialOut(*parts))
        inputs, known = self._validity(old, rows, yes)
        return self.lens.set(state, CachedOut(*parts, inputs, known, self.model))

    def _validity(
        self, old: CachedOut[Any, Any], rows: Any, yes: Bool[Array, " b"]
    ) -> tuple[Inputs, Bool[Array, " b"]]:
        """The new cache's inputs, and which of its systems are valid."""
        b = yes.shape[0]
        padded = jnp.append(yes, False)
        was, now = jnp.clip(old.inputs.system, 0, b), jnp.clip(self.inputs.system, 0, b)
        # An atom that becomes padding, or was, follows its real system's acceptance.
        replaced = jnp.where(now < b, padded[now], padded[was])
        new = {
            name: _select(replaced, getattr(self.inputs, name), getattr(old.inputs, name))
            for name in _BY_ATOM
        }
        new |= {
            name: _select(yes, getattr(self.inputs, name), getattr(old.inputs, name))
            for name in _BY_SYSTEM
        }
        # An atom changed system, and only one of the two systems was accepted.
        torn = (was < b) & (now < b) & (padded[was] != padded[now])
        torn = _any_by_system(torn, was, b) | _any_by_system(torn, now, b)
        skipped, stored = jnp.zeros(b, bool), jnp.zeros(b, bool)
        for mask, system in _masks_with_systems(rows, now, b):
            skipped |= _any_by_system(~mask, system, b)
            stored |= _any_by_system(mask, system, b)
        known = jnp.where(yes, self.valid & ~skipped, old.known & ~stored) & ~torn
        return Inputs(**new), known


def check_cache(
    cache: Any, out: PotentialOut[Any, Any], inputs: Inputs, model: Any
) -> PotentialOut[Any, Any] | None:
    """Checks the cache's content: a `CachedOut`, a plain output, or None if it is empty.

    Raises:
        TypeError: it is something else.
        ValueError: it has another structure, or belongs to another model.
    """
    where = "torchcall: out_cache_lens"
    remedy = "make a new one with empty_cache"
    if cache is None or isinstance(cache, EmptyType):
        return None
    if not all(hasattr(cache, name) for name in ("total_energies", "gradients", "hessians")):
        raise TypeError(f"{where}: expected a PotentialOut, got {type(cache).__name__}")
    found = [cache.total_energies.data, cache.gradients]
    expected = [out.total_energies.data, out.gradients]
    if isinstance(cache, CachedOut):
        if cache.model is not model:
            raise ValueError(f"{where}: expected an output of this model, got another's; {remedy}")
        found.append(cache.inputs)
        expected.append(inputs)
    if tuple(cache.total_energies.keys) != out.total_energies.keys:
        raise ValueError(
            f"{where}: expected the state's systems, got other keys of total_energies; {remedy}"
        )
    for old, new in zip(found, expected, strict=True):
        if jax.tree.structure(old) != jax.tree.structure(new):
            raise ValueError(
                f"{where}: gradients: expected {jax.tree.structure(new)}, got "
                f"{jax.tree.structure(old)}; compute_cell_gradients may differ from the cache's"
            )
        for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
            if a.shape != b.shape or a.dtype != b.dtype:
                raise ValueError(
                    f"{where}: expected {b.dtype} {b.shape}, got {a.dtype} {a.shape}; {remedy}"
                )
    return cache


_BY_ATOM = ("positions", "atomic_numbers", "system", "edges")
_BY_SYSTEM = ("cell", "pbc", "charge", "spin")


def _parts(out: PotentialOut[Any, Any]) -> tuple[Any, Any, EmptyType]:
    # The table may be of another type; only keys and data are needed.
    energies = out.total_energies
    return Table(tuple(energies.keys), energies.data), out.gradients, EMPTY


def _select(mask: Array, new: Array, old: Array) -> Array:
    return jnp.where(mask.reshape(mask.shape + (1,) * (new.ndim - mask.ndim)), new, old)


def _masks_with_systems(rows: Any, now: Array, b: int) -> list[tuple[Array, Array]]:
    systems = lax.iota(jnp.int32, b)
    masks = jax.tree.leaves(rows)
    # In order: energies per system, position gradients per atom, cell gradients per system.
    row_systems = [systems, now, systems]
    return list(zip(masks, row_systems[: len(masks)], strict=True))


def _any_by_system(flags: Bool[Array, " n"], system: Int[Array, " n"], b: int) -> Array:
    at = jnp.where((system >= 0) & (system < b), system, b)
    return jnp.zeros(b, jnp.int32).at[at].add(flags.astype(jnp.int32), mode="drop") > 0


def _same_bits(a: Array, b: Array) -> Bool[Array, " rows"]:
    if jnp.issubdtype(a.dtype, jnp.floating):
        kind = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}[a.dtype.itemsize]
        a, b = lax.bitcast_convert_type(a, kind), lax.bitcast_convert_type(b, kind)
    return jnp.all(a == b, axis=tuple(range(1, a.ndim)))


def _edge_sums(graph: AtomGraph) -> UInt32[Array, "n 2"]:
    """Sums of two independent hashes of (receiver, S) over each atom's edges."""
    n, e = graph.positions.shape[0], graph.edge_index.shape[1]
    i, j = graph.edge_index
    used = (i >= 0) & (i < n) & (j >= 0) & (j < n)
    if graph.n_edges is not None:
        used &= lax.iota(jnp.int32, e) < graph.n_edges
    words = [j, *jnp.round(graph.cell_offsets).astype(jnp.int32).T]
    lanes = []
    for seed in (0x9E3779B9, 0x85EBCA6B):
        lane = jnp.full(e, seed, jnp.uint32)
        for word in words:
            lane = _mix(lane ^ lax.bitcast_convert_type(word.astype(jnp.int32), jnp.uint32))
        lanes.append(jnp.where(used, lane, jnp.uint32(0)))
    sums = jnp.zeros((n, 2), jnp.uint32)
    return sums.at[jnp.where(used, i, n)].add(jnp.stack(lanes, axis=1), mode="drop")


def _mix(h: UInt32[Array, " e"]) -> UInt32[Array, " e"]:
    # The finaliser of MurmurHash3, https://github.com/aappleby/smhasher (public domain).
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
