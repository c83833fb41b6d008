"""Committees: several potentials on one graph in one call, their mean and their deviation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from jax import Array
from jax.custom_batching import custom_vmap
from jaxtyping import Float

from torchcall._call.meshes import whole
from torchcall._call.specs import any_traced
from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap._calls import call_options
from torchcall.mliap._committee_torch import combined
from torchcall.mliap._energy import EnergyAndGradients, nan_where
from torchcall.mliap._graph import AtomGraph, check_graph, lacks_edges, listed, without_list
from torchcall.mliap._hessian import own_rows
from torchcall.mliap._input import input_dtypes, narrowing
from torchcall.mliap._merge import evaluate_merged
from torchcall.mliap._model import TorchMliap
from torchcall.mliap._model_programs import model_programs


class CommitteeOut(NamedTuple):
    """Means and deviations over the k members, without phantoms and in the caller's order.

    Deviations are those of a population, with 1/k, as in DP-GEN's model deviation.

    Attributes:
        energy: (b,), ⟨E⟩ in eV.
        energy_deviation: (b,), √⟨(E − ⟨E⟩)²⟩ in eV.
        position_gradients: (n, 3), ⟨∂E/∂r⟩ in eV/Å; zero for padded atoms.
        position_gradients_deviation: (n,), √⟨|∂E/∂r − ⟨∂E/∂r⟩|²⟩ of each atom in eV/Å, which is
            also that of the forces; zero for padded atoms.
        cell_gradients: (b, 3, 3), ⟨∂E/∂h⟩ in eV/Å; None unless the members compute them.
    """

    energy: Float[Array, " b"]
    energy_deviation: Float[Array, " b"]
    position_gradients: Float[Array, "n 3"]
    position_gradients_deviation: Float[Array, " n"]
    cell_gradients: Float[Array, "b 3 3"] | None


def committee(models: Sequence[TorchMliap], **options: Any) -> TorchMliap:
    """The potential `E = (1/k) Σ E_m` of k potentials, which are evaluated in one custom call.

    It is used like any other: `energy`, the state interface and the integrations get the mean, with
    the mean of the gradients that the members return. `committee_statistics` returns deviations
    too. Members share their weights with the models. If all are TorchScript, so is the committee;
    otherwise it is eager, and `stats()["fallback"]` has the reason.

    Args:
        models: one or more, with the same cutoff. A committee knows the elements that all members
            know.
        **options: those of `TorchModuleWrapper`, except `input_spec` and `output_spec`.

    Raises:
        ValueError: there are no models; cutoffs or `compute_cell_gradients` differ; no element is
            known to all; a model has a capacity; or a model is a package: one call runs one
            package, so make the committee of its modules, and compile it if necessary.
        TypeError: a member is no `TorchMliap` of a torch module that gets an `AtomGraphInput`.
    """
    first = _checked(models)
    members = []
    for k, model in enumerate(models):
        members.append((model.wrapper._inspected(), _float_cast(k, model)))
    module, reason = combined(
        members,
        [model.wrapper._source.engine for model in models],
        first.compute_cell_gradients,
        _common_species(models),
    )
    options = {
        "requires_grad": any(model.wrapper._options["requires_grad"] for model in models),
        **options,
    }
    narrow = "auto" if all(model.narrow == "auto" for model in models) else False
    made = TorchMliap.from_module(
        module, first.cutoff, first.compute_cell_gradients, narrow=narrow, **options
    )
    made.wrapper._fallback = reason
    return made


def committee_statistics(model: TorchMliap, graph: AtomGraph) -> CommitteeOut:
    """Means and deviations of energies and gradients over a committee's members, in one call.

    Args:
        model: made by `committee`.
        graph: the atoms and their edges.

    Returns:
        Energies in eV, gradients in eV/Å, in the positions' dtype; NaN where `energy` is. Under
        `jax.vmap` the mapped graphs are merged into one batched graph.

    Raises:
        ValueError: the model is no committee; or as for `energy`.
        NotImplementedError: when differentiated. `energy` differentiates the mean.
    """
    wrapper = model.wrapper
    if not (
        isinstance(wrapper, TorchModuleWrapper)
        and wrapper._fact("committee", lambda module: getattr(module, "committee_size", 0))
    ):
        raise ValueError(
            f"torchcall: {model._name}: committee_statistics: expected a model made by "
            "torchcall.mliap.committee, got another one"
        )
    check_graph(graph)
    model.check_cutoff(graph)
    model.check_species(graph)
    graph = whole(listed(graph))
    if any_traced(jax.tree.leaves((model, graph))):
        return _traced(model, graph)
    return _program(model)(model.cutoff.data, graph)


def _checked(models: Sequence[TorchMliap]) -> TorchMliap:
    """The first of the models, which fit each other."""
    if not isinstance(models, Sequence):
        raise TypeError(
            "torchcall: committee: models: expected a list of TorchMliap, got "
            f"{type(models).__name__}"
        )
    if len(models) == 0:
        raise ValueError("torchcall: committee: expected one or more models, got none")
    for k, model in enumerate(models):
        where = f"torchcall: committee: models[{k}]"
        if not isinstance(model, TorchMliap) or not isinstance(model.wrapper, TorchModuleWrapper):
            kind = type(model.wrapper if isinstance(model, TorchMliap) else model).__name__
            raise TypeError(f"{where}: expected a TorchMliap of a torch module, got {kind}")
        if model.wrapper._source.engine == "AOTInductor":
            raise ValueError(
                f"{where}: expected a TorchScript or eager model, got a package: one call runs one "
                "package; make the committee of the modules that were compiled"
            )
        cutoffs = [np.asarray(m.cutoff.data) for m in (models[0], model)]
        if cutoffs[0].shape != cutoffs[1].shape or not np.allclose(*cutoffs, rtol=1e-6, atol=0):
            raise ValueError(
                f"{where}: cutoff: expected {cutoffs[0].tolist()} Å as in models[0], got "
                f"{cutoffs[1].tolist()} Å: a member must not get edges beyond its cutoff"
            )
        if model.capacity is not None:
            raise ValueError(
                f"{where}: capacity: expected a model for any shapes, got one for {model.capacity}"
            )
        if model.compute_cell_gradients != models[0].compute_cell_gradients:
            raise ValueError(
                f"{where}: compute_cell_gradients: expected {models[0].compute_cell_gradients} as "
                f"in models[0], got {model.compute_cell_gradients}"
            )
    return models[0]


def _float_cast(k: int, model: TorchMliap) -> Any:
    """The dtype to which a member's float inputs are cast, None where they are not."""
    given = model.wrapper._options["input_spec"]
    match given:
        case ((dict() as casts,), {}) if all(
            casts.get(key) == dtype for key, dtype in input_dtypes().items() if dtype is not None
        ):
            return casts.get("pos")
    raise TypeError(
        f"torchcall: committee: models[{k}]: expected a model of from_module, from_energy or "
        f"torchcall.models, got one with the input_spec {given}"
    )


def _common_species(models: Sequence[TorchMliap]) -> list[int]:
    """The elements that all members know, empty where none declares any."""
    known = [set(model.species) for model in models if model.species is not None]
    common = sorted(set.intersection(*known)) if known else []
    if known and not common:
        raise ValueError(
            "torchcall: committee: species: expected members with common elements, got "
            + " and ".join(str(model.species) for model in models)
        )
    return common


_program = model_programs(
    "torchcall_committee", lambda model, graph: _guarded(_evaluate, model, graph)
)


@jax.custom_jvp
def _traced(model: TorchMliap, graph: AtomGraph) -> CommitteeOut:
    return _guarded(_merging, model, graph)


@_traced.defjvp
def _traced_jvp(primals: Any, tangents: Any) -> NoReturn:
    del primals, tangents
    raise NotImplementedError(
        "torchcall: committee_statistics: derivatives are not supported; differentiate "
        "torchcall.mliap.energy, the mean, or apply jax.lax.stop_gradient to the graph"
    )


def _guarded(
    evaluate: Callable[[TorchMliap, AtomGraph], CommitteeOut], model: TorchMliap, graph: AtomGraph
) -> CommitteeOut:
    """One evaluation, NaN where edges may be missing."""
    out = evaluate(model, without_list(graph))
    incomplete = lacks_edges(graph)
    if incomplete is None:
        return out
    spread = out.position_gradients_deviation[:, None]
    mean = nan_where(
        incomplete,
        graph,
        EnergyAndGradients(out.energy, out.position_gradients, out.cell_gradients),
    )
    deviation = nan_where(incomplete, graph, EnergyAndGradients(out.energy_deviation, spread, None))
    return CommitteeOut(
        mean.energy,
        deviation.energy,
        mean.position_gradients,
        deviation.position_gradients[:, 0],
        mean.cell_gradients,
    )


def _evaluate(model: TorchMliap, graph: AtomGraph) -> CommitteeOut:
    n_systems = graph.cell.shape[0]
    padded, masks = model.padded(graph)
    options, lengths = call_options(model, padded, masks.n_atoms, masks.n_edges)
    specs = model.output_specs(padded)
    for key, rows in (("energy", "energy"), ("position_gradients", "position_gradients")):
        shape = specs[rows].shape[:1]
        specs[f"{key}_deviation"] = jax.ShapeDtypeStruct(shape, specs[rows].dtype)
    options = replace(
        options,
        outputs=specs,
        narrowing=None if options.narrowing is None else narrowing(tuple(specs)),
        gradient_of=(),
    )
    out = model.wrapper._call((padded,), {}, options, lengths)
    spread = out["position_gradients_deviation"][:, None]
    cells = out.get("cell_gradients")
    return CommitteeOut(
        out["energy"][:n_systems],
        out["energy_deviation"][:n_systems],
        own_rows(graph, masks, out["position_gradients"]),
        own_rows(graph, masks, spread)[:, 0],
        None if cells is None else cells[:n_systems],
    )


_merging = custom_vmap(_evaluate)


@_merging.def_vmap
def _evaluate_merged(
    axis_size: int, in_batched: list[Any], model: TorchMliap, graph: AtomGraph
) -> tuple[CommitteeOut, CommitteeOut]:
    return evaluate_merged(_merging, axis_size, in_batched[1], model, graph)
