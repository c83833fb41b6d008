"""An evaluation that is skipped where every system's result is stored, and its derivatives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import ShapedArray
from jax.custom_batching import custom_vmap
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool

from torchcall.mliap._energy import (
    EnergyAndGradients,
    energy_tangent,
    evaluation,
    moving,
    refuse_second_derivatives,
)
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._model import TorchMliap


class Stored(NamedTuple):
    """What is known already.

    Attributes:
        out: results by system and atom.
        known: (b,), whether a system's results are those of the graph.
    """

    out: EnergyAndGradients
    known: Bool[Array, " b"]


def evaluate(
    model: TorchMliap, graph: AtomGraph, stored: Stored | None, unsure: Bool[Array, ""]
) -> EnergyAndGradients:
    """Energies, differentiable as `torchcall.mliap.energy`, and gradients, from one evaluation or
    none.

    Args:
        model: the potential.
        graph: the atoms and their edges.
        stored: results that need no evaluation. Where every system is known, the model is not
            called; else it is, and what is known stays, bit by bit.
        unsure: whether edges may be missing; everything is NaN then.

    Returns:
        Results without phantoms, in the caller's order. Gradients have no derivatives: asking for
        them in reverse mode is a NotImplementedError, in forward mode they are NaN.
    """
    offsets = lax.stop_gradient(graph.cell_offsets)
    graph = replace(graph, cell_offsets=offsets)
    return _evaluate(*lax.stop_gradient((model, stored)), graph, unsure)


@jax.custom_jvp
def _evaluate(
    model: TorchMliap, stored: Stored | None, graph: AtomGraph, unsure: Array
) -> EnergyAndGradients:
    return _choose(model, stored, graph, unsure)


def _evaluate_jvp(primals: Any, tangents: Any) -> tuple[EnergyAndGradients, EnergyAndGradients]:
    graph, moves = primals[2], tangents[2]
    out = _choose_once(*primals)
    change = energy_tangent(out, graph, moves)
    if moving(moves.positions) or moving(moves.cell):
        lost = jax.tree.map(lambda x: _no_tangent(jnp.sum(change), x), out)
    else:
        lost = jax.tree.map(jnp.zeros_like, out)
    return out, lost._replace(energy=change)


_evaluate.defjvp(_evaluate_jvp, symbolic_zeros=True)


@jax.custom_jvp
def _choose_once(*args: Any) -> EnergyAndGradients:
    return _choose(*args)


@_choose_once.defjvp
def _choose_once_jvp(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    refuse_second_derivatives()


@jax.jit
def _choose(
    model: TorchMliap, stored: Stored | None, graph: AtomGraph, unsure: Array
) -> EnergyAndGradients:
    # Padded atoms belong to a system of their own, whose gradients stay zero.
    assert graph.batch is not None
    if stored is None:
        out = evaluation(model, graph)
    else:
        zero = jax.tree.map(jnp.zeros_like, stored.out)
        # An atom that has become padding may have left its gradient.
        kept = _where(jnp.ones_like(stored.known), graph.batch, stored.out, zero)
        out = lax.cond(
            _in_any_replica(~jnp.all(stored.known)),
            lambda: evaluation(model, graph),
            lambda: kept,
        )
        out = _where(stored.known, graph.batch, kept, out)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), out)
    return _where(jnp.broadcast_to(unsure, out.energy.shape), graph.batch, nan, out)


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
def _in_any_replica(needed: Bool[Array, ""]) -> Bool[Array, ""]:
    """`needed`; under `vmap`, whether any replica needs it, so that a condition stays one."""
    return needed


@_in_any_replica.def_vmap
def _in_any_replica_vmap(axis_size: int, in_batched: Any, needed: Array) -> tuple[Array, bool]:
    del axis_size, in_batched
    return _in_any_replica(jnp.any(needed)), False


# A linear function of a scalar with NaN for its values, which refuses to be transposed: the tangent
# of gradients. Reverse mode never meets it unless their derivative is asked for.
_no_tangent_p = core.Primitive("torchcall_no_tangent")


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
    if not isinstance(cotangent, ad.Zero):
        refuse_second_derivatives()
    return [None]


mlir.register_lowering(_no_tangent_p, mlir.lower_fun(_impl, multiple_results=False))
batching.primitive_batchers[_no_tangent_p] = _batch
ad.deflinear2(_no_tangent_p, _transpose)
