"""The elements that a model declares, and what it does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from torchcall.mliap._check._report import Finding
from torchcall.mliap._check._trial import Trial
from torchcall.mliap._energy import energy_and_gradients
from torchcall.mliap._species import listed


def present(trial: Trial) -> list[int]:
    """The elements of the graph's atoms, ascending."""
    return np.unique(np.asarray(trial.graph.atomic_numbers)[trial.real]).tolist()


def another(trial: Trial) -> int | None:
    """An element that the model knows, not the only one in the graph; None if there is none."""
    here = present(trial)
    known = sorted(trial.model.species or here)
    others = [z for z in known if [z] != here]
    return others[-1] if others and here else None


def findings(trial: Trial) -> Iterator[Finding]:
    """Undeclared elements are refused; declared ones differ."""
    species = trial.model.species
    if not present(trial):
        return
    if species is None:
        trial.notes.append(
            "the model does not declare its elements, so an unknown one is not refused: give the "
            "module an attribute `species`, a list of atomic numbers"
        )
    else:
        yield _refused(trial, species)
    yield from _differ(trial, species)


def _refused(trial: Trial, species: tuple[int, ...]) -> Finding:
    unknown = next(z for z in range(1, len(species) + 2) if z not in species)
    first = int(np.argmax(trial.real))
    numbers = jnp.asarray(trial.graph.atomic_numbers).at[first].set(unknown)
    wrong = replace(trial.graph, atomic_numbers=numbers)
    calls: list[Callable[[], object]] = [lambda: energy_and_gradients(trial.model, wrong)]
    # On a GPU, traced numbers are not checked. The native check supports numbers below 128.
    if jax.default_backend() == "cpu" and species[-1] < 128:
        calls.append(lambda: trial.run(wrong))
    accepted = 0
    for call in calls:
        try:
            jax.block_until_ready(call())
            accepted += 1
        except (ValueError, RuntimeError):
            pass
    return Finding(
        "an element that the model does not declare is refused",
        float(accepted),
        0.0,
        f"Element {unknown} got an energy, although the model declares only {listed(species)}.",
    )


def _differ(trial: Trial, species: tuple[int, ...] | None) -> Iterator[Finding]:
    known = sorted(species or present(trial))
    if len(known) < 2:
        return
    numbers = np.asarray(trial.graph.atomic_numbers)
    # Each element becomes the next one that the model knows.
    place = np.searchsorted(known, np.where(trial.real, numbers, known[0]))
    swapped = np.where(trial.real, np.asarray(known)[(place + 1) % len(known)], numbers)
    swapped = jnp.asarray(swapped.astype(numbers.dtype))
    out = trial.run(replace(trial.graph, atomic_numbers=swapped))
    change = max(
        float(np.abs(a - b).max(initial=0)) for a, b in zip(out[:2], trial.out[:2], strict=True)
    )
    if species is None:
        if change == 0:
            trial.notes.append("atomic_numbers do not matter to the model")
        return
    yield Finding(
        "the elements that the model declares differ",
        float(change == 0),
        0.0,
        "All elements have the same energies and gradients. Look for atomic_numbers that are not "
        "used, or that are mapped to one row of a table.",
    )
