"""A torch potential over a graph of tables."""

from __future__ import annotations

from typing import Any, Literal, overload

import jax.numpy as jnp
from jaxtyping import Array, Bool

from torchcall.mliap._energy import EnergyAndGradients
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._state._evaluation import evaluate
from torchcall.mliap._state._graph import (
    HyperGraph,
    P,
    S,
    TorchMliapInput,
    atom_graph,
    refuse_known,
    system_rows,
)
from torchcall.mliap._state._neighbors import cutoffs_of
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
    """`E`, `∂E/∂r` and, when asked for, `∂E/∂h` of a graph, from one evaluation of its model.

    Atoms may come in any order: they are sorted by system and padded for the model, and the results
    are those of the real ones, in the caller's order. `jax.grad` of the energies in positions and
    cell uses the model's gradients.

    Args:
        inp: `parameters`, the potential; `graph`, with `particles` (n), `systems` (b) and `edges`.
        compute_cell_gradients: whether to return gradients of the cell too.

    Returns:
        `data`: `total_energies`, a table by system, (b,) in eV; `gradients`, (n, 3) in eV/Å or
        `PositionAndCell` of (n, 3) and (b, 3, 3); floats in the positions' dtype. They are NaN
        where `edges.did_overflow`. `patch`: changes nothing.

    Raises:
        TypeError, ValueError: something is missing, or has the wrong shape or dtype; or gradients
            of the cell are asked of a model without. The message names it.
        NotImplementedError: the derivative asked for is of second order, or in charge or spin.
    """
    model = checked_model(inp.parameters, "torch_mliap_model_fn: parameters")
    if compute_cell_gradients and not model.compute_cell_gradients:
        raise ValueError(
            "torchcall: torch_mliap_model_fn: compute_cell_gradients: expected a model with "
            "compute_cell_gradients=True, got one without"
        )
    graph = atom_graph(inp.graph)
    out = evaluate(model, graph, None, unsure(inp.graph, None, model))
    keys = system_rows(inp.graph.systems).keys
    return WithPatch(packaged(out, keys, compute_cell_gradients), IdPatch())


def checked_model(model: Any, name: str) -> TorchMliap:
    """The potential, or a TypeError."""
    if not isinstance(model, TorchMliap):
        raise TypeError(
            f"torchcall: {name}: expected a torchcall.mliap.TorchMliap, got {type(model).__name__}"
        )
    return model


def unsure(graph: HyperGraph[Any, Any], cutoffs: Any, model: TorchMliap) -> Bool[Array, ""]:
    """Whether edges may be missing, or reach elsewhere than the model; () bool.

    Args:
        graph: with edges that may have `did_overflow`.
        cutoffs: table by system that the edges were listed for, or None.
        model: the potential.

    Raises:
        ValueError: the cutoffs are known here and differ from the model's.
    """
    flag = getattr(graph.edges, "did_overflow", None)
    flag = jnp.zeros((), bool) if flag is None else jnp.asarray(flag, bool)
    if cutoffs is None:
        return flag
    systems = system_rows(graph.systems)
    listed = cutoffs_of(cutoffs, systems, "cutoffs")
    own = cutoffs_of(model.cutoff, systems, "model.cutoff").astype(listed.dtype)
    # Not "differ by more than": a NaN has to count.
    differ = ~jnp.all(jnp.abs(listed - own) <= 1e-6 * own)
    refuse_known(differ, "cutoffs", f"the model's, {model.cutoff.data}", cutoffs.data)
    return flag | differ


def packaged(
    out: EnergyAndGradients, keys: tuple[Any, ...], compute_cell_gradients: bool
) -> PotentialOut[Any, EmptyType]:
    """Results as an output."""
    gradients: Any = out.position_gradients
    if compute_cell_gradients:
        assert out.cell_gradients is not None
        gradients = PositionAndCell(out.position_gradients, out.cell_gradients)
    return PotentialOut(Table(keys, out.energy), gradients, EMPTY)


def unpacked(out: PotentialOut[Any, Any], compute_cell_gradients: bool) -> EnergyAndGradients:
    """An output as results."""
    gradients, cells = out.gradients, None
    if compute_cell_gradients:
        gradients, cells = gradients.positions, gradients.cell
    return EnergyAndGradients(out.total_energies.data, gradients, cells)
