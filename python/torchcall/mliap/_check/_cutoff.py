"""The contribution of a pair vanishes at the cutoff."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np

from torchcall.mliap._check._report import Finding
from torchcall.mliap._check._trial import Results, Trial


def findings(trial: Trial) -> Iterator[Finding]:
    """Moves the longest pair to the cutoff, and compares results with and without its edges."""
    requirement = "the contribution of a pair vanishes at the cutoff"
    graph = trial.graph
    cutoff = float(np.max(np.asarray(trial.model.cutoff.data)))
    close = 1e-5 if trial.eps < 1e-10 else 5e-5
    if not trial.used.any():
        trial.notes.append(f"not checked: {requirement}; the graph has no edges")
        return
    i, j = trial.index
    positions = np.asarray(graph.positions, float)
    vectors = _vectors(trial, positions)
    lengths = np.linalg.norm(vectors, axis=1)
    candidates = trial.used & (i != j) & (lengths < cutoff)
    if not candidates.any():
        trial.notes.append(f"not checked: {requirement}; the graph has no pair of two atoms")
        return
    pair = int(np.argmax(np.where(candidates, lengths, 0)))
    unit = vectors[pair] / lengths[pair]
    positions = positions.copy()
    positions[j[pair]] += (cutoff * (1 - close) - lengths[pair]) * unit
    positions = np.asarray(trial.array(positions), float)
    lengths = np.linalg.norm(_vectors(trial, positions), axis=1)

    def without(edges: np.ndarray) -> Results:
        index = np.where(trial.used & ~edges, trial.index, len(positions))
        index = jnp.asarray(index.astype(graph.edge_index.dtype))
        return trial.run(replace(graph, positions=trial.array(positions), edge_index=index))

    listed, dropped = without(lengths >= cutoff), without(lengths >= cutoff * (1 - 2 * close))
    s = int(trial.system[j[pair]])
    atoms = trial.batch == s
    rms = float(np.sqrt(np.square(listed.position_gradients[atoms]).mean()))
    energy = abs(float(listed.energy[s] - dropped.energy[s]))
    gradients = listed.position_gradients - dropped.position_gradients
    force = float(np.abs(gradients[atoms]).max())
    scale = rms + 1e-30
    # Energies per Å of a pair's range are of the size of forces.
    rounding = (8 * float(trial.noise[s]) + 5 * float(trial.spread[1][s])) / scale
    yield Finding(
        requirement,
        max(energy, force) / scale,
        max(10 * close, rounding),
        f"The energy jumps by {energy:.1e} eV and a force by {force:.1e} eV/Å when a pair crosses "
        f"the cutoff of {cutoff:g} Å: energy is not conserved. Multiply the pair's contribution by "
        "an envelope whose value and slope vanish there, or pass the cutoff that the model was "
        "trained with. Look for normalisations by the number of edges.",
    )


def _vectors(trial: Trial, positions: np.ndarray) -> np.ndarray:
    i, j = trial.index
    offsets, cell = (np.asarray(a, float) for a in (trial.graph.cell_offsets, trial.graph.cell))
    shift = np.einsum("ek,ekl->el", offsets, cell[trial.system[i]])
    return positions[j] - positions[i] + shift
