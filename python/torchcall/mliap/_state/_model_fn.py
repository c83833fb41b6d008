"""A torch potential as a function of a graph."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax.numpy as jnp
from jaxtyping import Array, Bool

from torchcall._call.meshes import whole
from torchcall.mliap._energy import EnergyAndGradients
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._rows import cutoffs_of, raise_if_concrete, system_rows
from torchcall.mliap._state._evaluation import evaluate
from torchcall.mliap._state._graph import HyperGraph, P, S, TorchMliapInput, atom_graph
from torchcall.mliap._state._patch import IdPatch, WithPatch
from torchcall.mliap._state._potential import EMPTY, EmptyType, PositionAndCell, PotentialOut
from torchcall.mliap._table import Table


@overload
def torch_mliap_model_fn(
    inp: TorchMliapInput[P, S], *, compute_cell_gradients: Literal[False] = False
) -> WithPatch[PotentialOut[Array, EmptyType], IdPatch[Any]]: ...


@overload
def torch_mliap_model_fn(
    inp: TorchMliapInput[P, S], *, compute_cell_gradients: Literal[True]
) -> WithPatch[PotentialOut[PositionAndCell, EmptyType], IdPatch[Any]]: ...


def torch_mliap_model_fn(
    inp: TorchMliapInput[P, S], *, compute_cell_gradients: bool = False
) -> (
    WithPatch[PotentialOut[Array, EmptyType], IdPatch[Any]]
    | WithPatch[PotentialOut[PositionAndCell, EmptyType], IdPatch[Any]]
):
    """`E`, `∂E/∂r` and, optionally, `∂E/∂h` of a graph, from one evaluation of the model.

    Atoms may come in any order: they are sorted by system and padded for the model. The results are
    those of the real atoms, in the caller's order. `jax.grad` of the energies with respect to
    positions and cell uses the model's gradients.

    Args:
        inp: `parameters`, the potential; `graph`, with `particles` (n), `systems` (b) and `edges`.
        compute_cell_gradients: whether to return cell gradients too.

    Returns:
        `data`: `total_energies`, a table by system, (b,) in eV; `gradients`, (n, 3) in eV/Å or
        `PositionAndCell` of (n, 3) and (b, 3, 3); floats in the positions' dtype. They are NaN if
        `edges.did_overflow`. `patch`: changes nothing.

    Raises:
        TypeError, ValueError: an attribute is missing, or has the wrong shape or dtype; or the
            model has no cell gradients. The message names it.
        NotImplementedError: for second derivatives, and derivatives in charge or spin.
    """
    model = checked_model(inp.parameters, "torch_mliap_model_fn: parameters")
    if compute_cell_gradients and not model.compute_cell_gradients:
        raise ValueError(
            "torchcall: torch_mliap_model_fn: compute_cell_gradients: expected a model with "
            "compute_cell_gradients=True, got one without"
        )
    given = whole(inp.graph)
    out = evaluate(model, atom_graph(given), None, edges_incomplete(given, None, model))
    keys = system_rows(given.systems).keys
    return WithPatch(to_output(out, keys, compute_cell_gradients), IdPatch())


def checked_model(model: Any, name: str) -> TorchMliap:
    """The model; raises TypeError if it is no TorchMliap."""
    if not isinstance(model, TorchMliap):
        raise TypeError(
            f"torchcall: {name}: expected a torchcall.mliap.TorchMliap, got {type(model).__name__}"
        )
    return model


def edges_incomplete(
    graph: HyperGraph[Any, Any], cutoffs: Any, model: TorchMliap
) -> Bool[Array, ""]:
    """Whether edges may be missing, or have another cutoff than the model; () bool.

    Args:
        graph: with edges that may have `did_overflow`.
        cutoffs: table by system of the edges' cutoffs, or None.
        model: the potential.

    Raises:
        ValueError: the cutoffs are concrete and differ from the model's.
    """
    flag = getattr(graph.edges, "did_overflow", None)
    flag = jnp.zeros((), bool) if flag is None else jnp.asarray(flag, bool)
    if cutoffs is None:
        return flag
    systems = system_rows(graph.systems)
    listed = cutoffs_of(cutoffs, systems, "cutoffs")
    own = cutoffs_of(model.cutoff, systems, "model.cutoff").astype(listed.dtype)
    # Negated, so that NaN counts as different.
    differ = ~jnp.all(jnp.abs(listed - own) <= 1e-6 * own)
    raise_if_concrete(differ, "cutoffs", f"the model's, {model.cutoff.data}", cutoffs.data)
    return flag | differ


def to_output(
    out: EnergyAndGradients, keys: tuple[Any, ...], compute_cell_gradients: bool
) -> PotentialOut[Any, EmptyType]:
    """Converts results to a `PotentialOut`."""
    gradients: Any = out.position_gradients
    if compute_cell_gradients:
        assert out.cell_gradients is not None
        gradients = PositionAndCell(out.position_gradients, out.cell_gradients)
    return PotentialOut(Table(keys, out.energy), gradients, EMPTY)


def from_output(out: PotentialOut[Any, Any], compute_cell_gradients: bool) -> EnergyAndGradients:
    """Converts a `PotentialOut` to results."""
    gradients, cells = out.gradients, None
    if compute_cell_gradients:
        gradients, cells = gradients.positions, gradients.cell
    return EnergyAndGradients(out.total_energies.data, gradients, cells)
