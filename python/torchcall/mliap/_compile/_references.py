"""Compares a package with its module on graphs."""

from collections.abc import Callable, Iterable

import torch

from torchcall._compile._compare import TOLERANCE, DifferentError, compare_tensors, largest
from torchcall.mliap._compile._cases import Case
from torchcall.mliap._compile._derivative import PotentialDerivative
from torchcall.mliap._compile._form import Graph
from torchcall.mliap._compile._gradients import Evaluate, PotentialModule


class References:
    """Results of the eager module, or of its derivative, for each case, computed once.

    Args:
        potential: what evaluates a graph.
        cases: the example, then the example with displaced atoms, then others.

    Raises:
        DifferentError: the module itself fails for a shape.
    """

    def __init__(
        self, potential: PotentialModule | PotentialDerivative, cases: Iterable[Case]
    ) -> None:
        self.cases = list(cases)
        self.results: list[dict[str, torch.Tensor]] = []
        for case in self.cases:
            try:
                self.results.append(potential.evaluate(case.graph))
            except Exception as error:
                raise DifferentError(
                    f"the module itself fails for {case.description}: "
                    f"{type(error).__name__}: {error}"
                ) from error
        self.tolerance = TOLERANCE[potential.dtype]

    def compare(self, evaluate: Evaluate) -> None:
        """Compares every case.

        Raises:
            DifferentError: a difference exceeds the tolerance; the first one is reported.
        """
        # Forces that vanish by symmetry and energies of isolated atoms need the scale of others.
        sizes = {
            key: max(largest(result[key]) for result in self.results[:2]) for key in self.results[0]
        }
        for case, expected in zip(self.cases, self.results, strict=True):
            found = _run(evaluate, case)
            for key, reference in expected.items():
                share = len(self.cases[0].graph["pos"]) if key == "energy" else 1
                size = max(largest(reference), sizes[key] / share)
                compare_tensors(
                    f"[{key!r}] for {case.description}", found[key], reference, self.tolerance, size
                )


def graph_function(module: Callable[..., tuple[torch.Tensor, ...]], keys: list[str]) -> Evaluate:
    """A traced module as a function of an `AtomGraphInput`."""

    def evaluate(graph: Graph) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return dict(zip(keys, module(*graph.values()), strict=True))

    return evaluate


def _run(evaluate: Evaluate, case: Case) -> dict[str, torch.Tensor]:
    try:
        return evaluate({key: value.clone() for key, value in case.graph.items()})
    except Exception as error:
        raise DifferentError(
            f"fails for {case.description}: {type(error).__name__}: {error}"
        ) from error
