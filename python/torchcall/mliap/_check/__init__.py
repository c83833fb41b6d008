"""Checks on given atoms that a potential has the properties that simulations require."""

from __future__ import annotations

from torchcall.mliap._check import _cutoff, _elements, _gradients, _symmetries
from torchcall.mliap._check._report import CheckReport, Finding
from torchcall.mliap._check._trial import Trial
from torchcall.mliap._graph import AtomGraph, check_graph
from torchcall.mliap._model import TorchMliap

__all__ = ["CheckReport", "Finding", "check_model"]


def check_model(model: TorchMliap, graph: AtomGraph, *, seed: int = 0) -> CheckReport:
    """Checks on these atoms the properties that simulations require; outside `jit`.

    Compares position and cell gradients with finite differences of the energies at fixed edges,
    along random directions and along the gradients. The steps are halved until the differences
    converge or rounding dominates. Then changes padding, the order of atoms, their images and the
    batch, and translates and rotates the systems: results must not change, except that gradients
    rotate. Moves a pair to the cutoff, where its contribution must vanish. Checks that undeclared
    elements are refused and that declared ones differ.

    Works on a copy of the graph whose atoms are wrapped into their cells and rounded to a grid, so
    that displacements, translations and images are exact in the positions' dtype. Tolerances
    follow from the rounding errors that are measured first. float64 detects much smaller errors
    than float32.

    Args:
        model: the potential.
        graph: realistic data: atoms that interact, with all edges up to the model's cutoff. Include
            systems of every kind that the model will serve.
        seed: seed of directions, rotations and permutations.

    Returns:
        The report. A failed check is a finding, not an exception. A model that cannot be called
        raises.
    """
    check_graph(graph)
    model.check_cutoff(graph)
    model.check_species(graph)
    trial = Trial(model, graph, seed)
    findings = [trial.finite()]
    if trial.is_finite:
        findings += [trial.repetition(), trial.precision()]
        for check in (_gradients, _symmetries, _cutoff, _elements):
            findings.extend(check.findings(trial))
    return CheckReport(tuple(findings), tuple(trial.notes))
