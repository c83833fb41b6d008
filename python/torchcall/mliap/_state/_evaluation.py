"""Evaluation with a cache: skips the model if all systems are cached. Defines its derivatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool

from torchcall._undocumented.of_jax import (
    Primitive,
    ShapedArray,
    Zero,
    deflinear2,
    lower_fun,
    primitive_batchers,
    register_lowering,
)
from torchcall.mliap._energy import (
    EnergyAndGradients,
    energy_tangent,
    evaluation,
    has_tangent,
    nan_where,
)
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._model import TorchMliap


class Stored(NamedTuple):
    """Cached results.

    Attributes:
        out: results by system and atom.
        known: (b,), whether a system's results are valid for the graph.
    """

    out: EnergyAndGradients
    known: Bool[Array, " b"]


def evaluate(
    model: TorchMliap, graph: AtomGraph, stored: Stored | None, incomplete: Bool[Array, ""]
) -> EnergyAndGradients:
    """Energies, differentiable like `torchcall.mliap.energy`, and gradients; one call at most.

    Args:
        model: the potential.
        graph: the atoms and their edges.
        stored: cached results. If all systems are known, the model is not called. Otherwise it is,
            and known results keep their bits.
        incomplete: whether edges may be missing; all results are then NaN.

    Returns:
        Results without phantoms, in the caller's order. Gradients have no derivatives: they raise
        NotImplementedError in reverse mode and are NaN in forward mode.
    """
    if graph.did_overflow is not None:
        incomplete = incomplete | graph.did_overflow
    offsets = lax.stop_gradient(graph.cell_offsets)
    graph = replace(graph, cell_offsets=offsets, did_overflow=None)
    return _evaluate(*lax.stop_gradient((model, stored)), graph, incomplete)


@jax.custom_jvp
def _evaluate(
    model: TorchMliap, stored: Stored | None, graph: AtomGraph, incomplete: Array
) -> EnergyAndGradients:
    return _choose(model, stored, graph, incomplete)


def _evaluate_jvp(primals: Any, tangents: Any) -> tuple[EnergyAndGradients, EnergyAndGradients]:
    graph, moves = primals[2], tangents[2]
    out = _choose_once(*primals)
    change = energy_tangent(out, graph, moves)
    if has_tangent(moves.positions) or has_tangent(moves.cell):
        tangent = jax.tree.map(lambda x: _no_tangent(jnp.sum(change), x), out)
    else:
        tangent = jax.tree.map(jnp.zeros_like, out)
    return out, tangent._replace(energy=change)


_evaluate.defjvp(_evaluate_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _choose_once(*args: Any) -> EnergyAndGradients:
    return _choose(*args)


@_choose_once.defjvp
def _choose_once_jvp(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    _refuse()


@jax.jit
def _choose(
    model: TorchMliap, stored: Stored | None, graph: AtomGraph, incomplete: Array
) -> EnergyAndGradients:
    # Gradients of padded atoms stay zero.
    assert graph.batch is not None
    if stored is None:
        out = evaluation(model, graph)
    else:
        zero = jax.tree.map(jnp.zeros_like, stored.out)
        # The cache may hold the gradient of an atom that has become padding.
        cached = _where(jnp.ones_like(stored.known), graph.batch, stored.out, zero)
        out = lax.cond(
            _in_any_mapped(~jnp.all(stored.known)),
            lambda: evaluation(model, graph),
            lambda: cached,
        )
        out = _where(stored.known, graph.batch, cached, out)
    return nan_where(incomplete, graph, out)


def _where(
    systems: Bool[Array, " b"], batch: Array, yes: EnergyAndGradients, no: EnergyAndGradients
) -> EnergyAndGradients:
    atoms = jnp.append(systems, False)[jnp.clip(batch, 0, systems.shape[0])]
    cells = None
    if yes.cell_gradients is not None and no.cell_gradients is not None:
        cells = jnp.where(systems[:, None, None], yes.cell_gradients, no.cell_gradients)
    return EnergyAndGradients(
        jnp.where(systems, yes.energy, no.energy),
        jnp.where(atoms[:, None], yes.position_gradients, no.position_gradients),
        cells,
    )


@custom_vmap
def _in_any_mapped(needed: Bool[Array, ""]) -> Bool[Array, ""]:
    """`needed`; under `vmap`, true if it is for any mapped state: `cond` stays a `cond`."""
    return needed


@_in_any_mapped.def_vmap
def _in_any_mapped_vmap(axis_size: int, in_batched: Any, needed: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _in_any_mapped(jnp.any(needed)), False


# The tangent of gradients: a linear function of a scalar whose value is NaN and whose transpose
# raises. Reverse mode only reaches it when differentiating gradients.
_no_tangent_p = Primitive("torchcall_no_tangent")


def _refuse() -> NoReturn:
    raise NotImplementedError(
        "torchcall: second derivatives of a potential of states are not supported; differentiate "
        "torchcall.mliap.energy, or apply jax.lax.stop_gradient to the gradients"
    )


def _no_tangent(tangent: Array, like: Array) -> Array:
    return _no_tangent_p.bind(tangent, shape=like.shape, dtype=np.dtype(like.dtype))


@_no_tangent_p.def_impl
def _impl(tangent: Array, *, shape: tuple[int, ...], dtype: Any) -> Array:
    del tangent
    return jnp.full(shape, jnp.nan, dtype)


@_no_tangent_p.def_abstract_eval
def _abstract_eval(tangent: Any, *, shape: tuple[int, ...], dtype: Any) -> ShapedArray:
    del tangent
    return ShapedArray(shape, dtype)


def _batch(args: Any, dims: Any, *, shape: tuple[int, ...], dtype: Any) -> tuple[Array, int]:
    (tangent,), (dim,) = args, dims
    return _no_tangent_p.bind(tangent, shape=(tangent.shape[dim], *shape), dtype=dtype), 0


def _transpose(cotangent: Any, tangent: Any, *, shape: Any, dtype: Any) -> Any:
    del tangent, shape, dtype
    if not isinstance(cotangent, Zero):
        _refuse()
    return [None]


register_lowering(_no_tangent_p, lower_fun(_impl, multiple_results=False))
primitive_batchers[_no_tangent_p] = _batch
deflinear2(_no_tangent_p, _transpose)
