"""Tangents of the gradients that a model returns: the energy's Hessian times a vector."""

from __future__ import annotations

import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from torchcall._call.specs import any_traced
from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap._graph import AtomGraph, ListedGraph, lacks_edges, without_list
from torchcall.mliap._hessian_check import wrong_products
from torchcall.mliap._merge import with_one_cutoff
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._model_programs import model_programs
from torchcall.mliap._padding import PaddingMasks
from torchcall.mliap._probe import no_second_derivatives
from torchcall.mliap._product import Gradients, product

# Per wrapper, and whether its cell gradients are used: why there are no second derivatives, or "".
_refusals: weakref.WeakKeyDictionary[TorchModuleWrapper, dict[bool, str]]
_refusals = weakref.WeakKeyDictionary()
_CUTOFF = 5.0  # Å


def hessian_product(
    model: TorchMliap, graph: AtomGraph, moves: Array | None, strains: Array | None
) -> Gradients:
    """`H v`, in one call: the tangents of `∂E/∂r` and `∂E/∂h` for the tangent `v` of `(r, h)`.

    E is the sum of the energies of all systems. H is symmetric, so JAX evaluates `vᵀ H`, one
    vector-Jacobian product of the gradients that the model returns. It is linear in v for JAX too,
    which transposes, maps and differentiates it. Under `vmap`, mapped graphs are merged.

    Args:
        model: the potential.
        graph: where the Hessian is taken.
        moves: (n, 3), tangent of the positions; None: zero.
        strains: (b, 3, 3), tangent of the cells; None: zero.

    Returns:
        In the caller's order, in eV/Å per unit of v; NaN where edges may be missing.

    Raises:
        NotImplementedError: the gradients that the model returns have no derivatives.
    """
    if moves is None and strains is None:
        no_strain = jnp.zeros_like(graph.cell) if model.compute_cell_gradients else None
        return jnp.zeros_like(graph.positions), no_strain
    arrays = jax.tree.leaves((model, graph, moves, strains))
    if isinstance(model.wrapper, TorchModuleWrapper):
        _require_second_derivatives(model)
        if not any_traced(arrays):
            return _program(model)(model.cutoff.data, graph, moves, strains)
    pushed = product(_evaluate, with_one_cutoff(model), without_list(graph), moves, strains)
    return _nan_if_incomplete(graph, pushed)


def _nan_if_incomplete(graph: AtomGraph, pushed: Gradients) -> Gradients:
    incomplete = lacks_edges(graph)
    if incomplete is None:
        return pushed
    # A product, because JAX transposes it: `where` would transpose to zeros.
    scale = jnp.where(incomplete, jnp.nan, 1).astype(graph.positions.dtype)
    return jax.tree.map(lambda x: scale * x, pushed)


def own_rows(
    graph: AtomGraph, masks: PaddingMasks, rows: Float[Array, "N 3"]
) -> Float[Array, "n 3"]:
    """The rows of the caller's atoms, in the caller's order; zero for padded atoms."""
    if isinstance(graph, ListedGraph):
        return rows[: graph.positions.shape[0]]
    real = (masks.rows < masks.n_atoms)[:, None]
    return jnp.where(real, rows[masks.rows], 0)


def _evaluate(
    model: TorchMliap, graph: AtomGraph, moves: Array | None, strains: Array | None
) -> Gradients:
    """The product of a graph without list."""
    if isinstance(model.wrapper, TorchModuleWrapper) and not any_traced(
        jax.tree.leaves((model, graph))
    ):
        return _program(model)(model.cutoff.data, graph, moves, strains)
    return _pushed(model, graph, moves, strains)


def _pushed(
    model: TorchMliap, graph: AtomGraph, moves: Array | None, strains: Array | None
) -> Gradients:
    def gradients(moved: dict[str, Array]) -> Gradients:
        padded, masks = model.padded(replace(graph, **moved))
        out = model.evaluate(padded, masks.n_atoms, masks.n_edges, only_gradients=True)
        cells = out.get("cell_gradients")
        return (
            own_rows(graph, masks, out["position_gradients"]),
            None if cells is None else cells[: graph.cell.shape[0]],
        )

    tangents = {"positions": moves, "cell": strains}
    tangents = {key: value for key, value in tangents.items() if value is not None}
    return jax.jvp(gradients, ({key: getattr(graph, key) for key in tangents},), (tangents,))[1]


def _guarded(
    model: TorchMliap, graph: AtomGraph, moves: Array | None, strains: Array | None
) -> Gradients:
    return _nan_if_incomplete(graph, _pushed(model, without_list(graph), moves, strains))


_program = model_programs("torchcall_hessian", _guarded)


def _require_second_derivatives(model: TorchMliap) -> None:
    wrapper, cells = model.wrapper, model.compute_cell_gradients
    known = _refusals.setdefault(wrapper, {})
    if cells not in known:
        reason = no_second_derivatives(wrapper, cells)
        if not reason and wrapper._source.engine != "AOTInductor":
            # Any cutoff serves, so a traced one is not needed.
            own = model.cutoff.data
            cutoff = _CUTOFF if isinstance(own, Tracer) else float(np.max(np.asarray(own)))
            reason = wrong_products(wrapper, cutoff, cells)
        known[cells] = reason
    if known[cells]:
        raise NotImplementedError(f"torchcall: {wrapper._name}: second derivatives: {known[cells]}")
