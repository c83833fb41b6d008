"""Energies whose JAX derivatives are the gradients that the model returned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import export
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from torchcall._call.meshes import whole
from torchcall._call.specs import any_traced
from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap._graph import (
    AtomGraph,
    ListedGraph,
    check_graph,
    lacks_edges,
    listed,
    without_list,
)
from torchcall.mliap._hessian import hessian_product, own_rows
from torchcall.mliap._merge import evaluate_merged
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._model_programs import model_programs


class EnergyAndGradients(NamedTuple):
    """Result of one evaluation, without phantoms and in the caller's order.

    Attributes:
        energy: (b,), in eV.
        position_gradients: (n, 3), ∂E/∂r in eV/Å; exactly zero for padded atoms.
        cell_gradients: (b, 3, 3), ∂E/∂h in eV/Å at fixed Cartesian positions; None unless the model
            computes them.
    """

    energy: Float[Array, " b"]
    position_gradients: Float[Array, "n 3"]
    cell_gradients: Float[Array, "b 3 3"] | None


export.register_namedtuple_serialization(
    EnergyAndGradients, serialized_name="torchcall.mliap.EnergyAndGradients"
)


def energy(model: TorchMliap, graph: AtomGraph) -> Float[Array, " b"]:
    """`E[s]` of each system in eV, with `dE = Σ ∂E/∂r · dr + Σ ∂E/∂h · dh`.

    `jax.grad`, `jax.value_and_grad` and `jax.jvp` with respect to positions and cell evaluate the
    model once and use the gradients that it returned. Under `jax.vmap`, the mapped graphs are
    merged into one batched graph: the model is called once for all of them.

    Second derivatives (`jax.hessian`, `jax.jvp` of `jax.grad`, a loss that contains forces)
    differentiate the gradients that the model returns. A Hessian-vector product is one call, under
    `jax.vmap` too. The first one compares a product with finite differences on a small structure.

    Edges are constants. The derivative by the cell is that at fixed Cartesian positions. For fixed
    fractional coordinates, make positions a function of the cell, `r = s @ h`.

    Args:
        model: the potential.
        graph: positions and cell are differentiable, charge and spin are not.

    Returns:
        (b,), in the positions' dtype. Energies and gradients are NaN if the graph's neighbour list
        overflowed, has more edges than slots, or was updated at positions or cells that are too far
        from these (see `AtomGraph.from_neighbors`).

    Raises:
        ValueError: a shape is wrong, the neighbour list's cutoff differs from the model's, a
            capacity is exceeded, the model does not declare the element of an atom, or the cell
            is differentiated and the model computes no cell gradients.
        NotImplementedError: derivatives by charge or spin are requested; or second derivatives of a
            model whose gradients torch cannot differentiate.
    """
    check_graph(graph)
    model.check_cutoff(graph)
    model.check_species(graph)
    # Offsets are integers: their derivative is zero.
    graph = whole(listed(graph))
    offsets = jax.lax.stop_gradient(graph.cell_offsets)
    return _energy(jax.lax.stop_gradient(model), replace(graph, cell_offsets=offsets))


def energy_and_gradients(model: TorchMliap, graph: AtomGraph) -> EnergyAndGradients:
    """`E`, `∂E/∂r` and, where the model computes it, `∂E/∂h`, from one evaluation.

    Args:
        model: the potential.
        graph: the atoms and their edges.

    Returns:
        Energies in eV, gradients in eV/Å, in the positions' dtype. Under `jax.vmap` the mapped
        graphs are merged into one batched graph.

    Raises:
        ValueError, NotImplementedError: as for `energy`. Derivatives of the gradients are second
            derivatives of the energy.
    """
    check_graph(graph)
    model.check_cutoff(graph)
    model.check_species(graph)
    return _guarded(model, whole(listed(graph)))


@jax.custom_jvp
def _energy(model: TorchMliap, graph: AtomGraph) -> Array:
    return _guarded(model, graph).energy


def _energy_jvp(
    primals: tuple[TorchMliap, AtomGraph], tangents: tuple[Any, Any]
) -> tuple[Array, Array]:
    model, graph = primals
    out = _guarded(model, graph)
    return out.energy, energy_tangent(out, graph, tangents[1])


_energy.defjvp(_energy_jvp, symbolic_zeros=True)


def energy_tangent(out: EnergyAndGradients, graph: AtomGraph, tangents: Any) -> Array:
    """`Σ ∂E/∂r · dr + Σ ∂E/∂h · dh` of each system.

    Args:
        out: gradients at the graph.
        graph: the atoms.
        tangents: the graph's tangents; `SymbolicZero` or None where there is none.

    Raises:
        ValueError: the cell has a tangent and the model computes no cell gradients.
        NotImplementedError: charge or spin has a tangent.
    """
    for name in ("charge", "spin"):
        if has_tangent(getattr(tangents, name)):
            raise NotImplementedError(
                f"torchcall: energy: differentiation in graph.{name} is not supported: models "
                "return gradients by positions and cell; apply jax.lax.stop_gradient to it"
            )
    moves, strains = tangents.positions, tangents.cell
    if has_tangent(strains) and out.cell_gradients is None:
        raise ValueError(
            "torchcall: energy: graph.cell: expected a model with "
            "compute_cell_gradients=True to differentiate in the cell, got one without"
        )
    return _contract(
        out,
        moves if has_tangent(moves) else None,
        strains if has_tangent(strains) else None,
        graph.batch,
    )


def has_tangent(tangent: Any) -> bool:
    """Whether a tangent is given and not a symbolic zero."""
    return tangent is not None and not isinstance(tangent, SymbolicZero)


@jax.jit  # one operation outside programs
def _contract(
    out: EnergyAndGradients, moves: Array | None, strains: Array | None, batch: Array | None
) -> Array:
    change = jnp.zeros_like(out.energy)
    if moves is not None:
        per_atom = jnp.sum(out.position_gradients * moves, axis=-1)
        change = change + _sum_by_system(per_atom, batch, out.energy.shape[0])
    if strains is not None and out.cell_gradients is not None:
        change = change + jnp.sum(out.cell_gradients * strains, axis=(-2, -1))
    return change


def _sum_by_system(values: Array, batch: Array | None, n_systems: int) -> Array:
    if n_systems == 1:
        # Padded atoms have gradients of exactly zero.
        return jnp.sum(values)[None]
    assert batch is not None
    system = jnp.where(batch < 0, n_systems, batch)
    return jnp.zeros(n_systems, values.dtype).at[system].add(values, mode="drop")


def _guarded(model: TorchMliap, graph: AtomGraph) -> EnergyAndGradients:
    """One evaluation, NaN where edges may be missing. Outside programs it is compiled once."""
    concrete = not any_traced(jax.tree.leaves((model, graph)))
    if concrete and isinstance(model.wrapper, TorchModuleWrapper):
        return _program(model)(model.cutoff.data, graph)
    return _traced(model, graph)


# Without rules for derivatives and `vmap`.
_program = model_programs(
    "torchcall_energy", lambda model, graph: _nan_if_incomplete(_evaluate, model, graph)
)


def _nan_if_incomplete(
    evaluate: Callable[[TorchMliap, AtomGraph], EnergyAndGradients],
    model: TorchMliap,
    graph: AtomGraph,
) -> EnergyAndGradients:
    out = evaluate(model, without_list(graph))
    incomplete = lacks_edges(graph)
    return out if incomplete is None else nan_where(incomplete, graph, out)


@jax.custom_jvp
def _traced(model: TorchMliap, graph: AtomGraph) -> EnergyAndGradients:
    return _nan_if_incomplete(evaluation, model, graph)


def _traced_jvp(
    primals: tuple[TorchMliap, AtomGraph], tangents: tuple[Any, Any]
) -> tuple[EnergyAndGradients, EnergyAndGradients]:
    model, graph = primals
    moves, strains = (
        tangent if has_tangent(tangent) else None
        for tangent in (tangents[1].positions, tangents[1].cell)
    )
    out = _guarded(model, graph)
    change = energy_tangent(out, graph, tangents[1])
    return out, EnergyAndGradients(change, *hessian_product(model, graph, moves, strains))


_traced.defjvp(_traced_jvp, symbolic_zeros=True)


def nan_where(
    flag: Bool[Array, ""], graph: AtomGraph, out: EnergyAndGradients
) -> EnergyAndGradients:
    """NaN for all real systems and atoms if the flag is set; zero for padded atoms.

    Gradients are NaN too: `jnp.where(flag, nan, energy)` alone would have gradients of zero.
    """
    atoms = flag
    if graph.batch is not None and not isinstance(graph, ListedGraph):
        atoms = flag & ((graph.batch >= 0) & (graph.batch < graph.cell.shape[0]))[:, None]
    cells = out.cell_gradients
    return EnergyAndGradients(
        jnp.where(flag, jnp.nan, out.energy),
        jnp.where(atoms, jnp.nan, out.position_gradients),
        None if cells is None else jnp.where(flag, jnp.nan, cells),
    )


def _evaluate(model: TorchMliap, graph: AtomGraph) -> EnergyAndGradients:
    """Evaluates the model once, in the caller's order. All evaluations pass through here."""
    n_systems = graph.cell.shape[0]
    padded, masks = model.padded(graph)
    out = model.evaluate(padded, masks.n_atoms, masks.n_edges)
    cells = out.get("cell_gradients")
    return EnergyAndGradients(
        out["energy"][:n_systems],
        own_rows(graph, masks, out["position_gradients"]),
        None if cells is None else cells[:n_systems],
    )


evaluation = custom_vmap(_evaluate)


@evaluation.def_vmap
def _evaluate_merged(
    axis_size: int, in_batched: list[Any], model: TorchMliap, graph: AtomGraph
) -> tuple[EnergyAndGradients, EnergyAndGradients]:
    return evaluate_merged(evaluation, axis_size, in_batched[1], model, graph)
