"""Changes of the input that must not change results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from torchcall.mliap._check import _elements
from torchcall.mliap._check._report import Finding
from torchcall.mliap._check._trial import Results, Trial
from torchcall.mliap._graph import check_graph
from torchcall.mliap._merge import merge_graphs
from torchcall.mliap._padding import pad_graph


def findings(trial: Trial) -> Iterator[Finding]:
    """The findings, the basic ones first."""
    yield _padding(trial)
    yield _permutation(trial)
    yield _translation(trial)
    yield _rotation(trial)
    yield _images(trial)
    yield from _batches(trial)


def _padding(trial: Trial) -> Finding:
    n, b, e = check_graph(trial.graph)
    sizes = trial.model.capacity or (n + 8, max(2, e) + 35, b + 2)
    padded, masks = pad_graph(
        trial.graph,
        cutoff=trial.model.cutoff,
        **dict(zip(("n_atoms", "n_edges", "n_systems"), sizes, strict=True)),
    )
    numbers = np.asarray(padded["atomic_numbers"])
    other = _elements.another(trial)
    if other is not None:
        numbers = np.where(np.arange(len(numbers)) < int(masks.n_atoms), numbers, other)
    padded["atomic_numbers"] = jnp.asarray(numbers, padded["atomic_numbers"].dtype)
    out = {key: np.asarray(value).astype(float) for key, value in trial.model.call(padded).items()}
    cells = out.get("cell_gradients")
    # Padding atoms have rows after those of the real atoms.
    rows = np.asarray(masks.rows)
    found = Results(
        out["energy"][:b],
        np.where(trial.real[:, None], out["position_gradients"][rows], 0),
        None if cells is None else cells[:b],
    )
    return Finding(
        "padded atoms and edges do not change results",
        trial.deviation(found),
        trial.same,
        "Results would depend on capacities, which vary during a run. Look for sums or means "
        "over all atoms or edges instead of those of each system, for edges beyond the cutoff that "
        "contribute, and for tables built from the elements that are present.",
    )


def _permutation(trial: Trial) -> Finding:
    n = len(trial.batch)
    order = trial.random.permutation(n)
    rows = np.empty(n, int)
    rows[order] = np.arange(n)
    graph = trial.graph
    moved = np.where(trial.used, rows[trial.index], n) if n else trial.index
    out = trial.run(
        replace(
            graph,
            positions=graph.positions[order],
            atomic_numbers=graph.atomic_numbers[order],
            batch=jnp.asarray(trial.batch[order].astype(np.int32)),
            edge_index=jnp.asarray(moved.astype(graph.edge_index.dtype)),
        )
    )
    found = out._replace(position_gradients=out.position_gradients[rows])
    return Finding(
        "the order of atoms does not change results",
        trial.deviation(found),
        trial.same,
        "Results would depend on the order of atoms in the file. Look for operations along "
        "the atoms' axis other than sums over edges and systems.",
    )


def _translation(trial: Trial) -> Finding:
    shift = trial.rounded(trial.random.uniform(-1, 1, 3))
    return Finding(
        "translations do not change results",
        trial.deviation(trial.moved("positions", shift * trial.real[:, None])),
        trial.same,
        "Momentum is not conserved. Look for positions that are not used as differences.",
    )


def _rotation(trial: Trial) -> Finding:
    q, _ = np.linalg.qr(trial.random.normal(size=(3, 3)))
    q *= np.sign(np.linalg.det(q))
    positions, cell = (np.asarray(a, float) for a in (trial.graph.positions, trial.graph.cell))
    out = trial.run(
        replace(trial.graph, positions=trial.array(positions @ q), cell=trial.array(cell @ q))
    )
    cells = None if out.cell_gradients is None else out.cell_gradients @ q.T
    found = Results(out.energy, out.position_gradients @ q.T, cells)
    return Finding(
        "rotations do not change energies, and rotate gradients",
        trial.deviation(found),
        trial.same,
        "Angular momentum is not conserved. Lattice gradients from virials are wrong, because "
        "they assume this invariance. Models that learnt it from data have it approximately.",
    )


def _images(trial: Trial) -> Finding:
    """Displaces atoms by lattice vectors: ∂E/∂h changes by -Σ n ⊗ ∂E/∂r, all else stays."""
    graph, system = trial.graph, trial.system
    cell, pbc = np.asarray(graph.cell, float), np.asarray(graph.pbc)
    steps = np.zeros(graph.positions.shape)
    if len(pbc):
        # The caller's images, if atoms were not wrapped, and further ones.
        steps = trial.images + trial.random.integers(-1, 2, steps.shape)
        steps = steps * trial.real[:, None] * pbc[system]
    shift = np.einsum("nk,nkl->nl", steps, cell[system]) if len(pbc) else steps
    i, j = trial.index
    change = (steps[i] - steps[j]) * trial.used[:, None] if len(steps) else 0
    out = trial.run(
        replace(
            graph,
            positions=trial.array(np.asarray(graph.positions, float) + shift),
            cell_offsets=trial.array(np.asarray(graph.cell_offsets, float) + change),
        )
    )
    expected = trial.out
    if expected.cell_gradients is not None:
        moment = np.zeros_like(expected.cell_gradients)
        outer = np.einsum("nk,nl->nkl", steps, expected.position_gradients)
        np.add.at(moment, system, outer)
        expected = expected._replace(cell_gradients=expected.cell_gradients - moment)
    return Finding(
        "periodic images of atoms do not change results",
        trial.deviation(out, expected),
        trial.same,
        "The energy would jump when an atom crosses a face of the cell. The vector of an edge "
        "is pos[receiver] - pos[sender] + cell_offsets @ cell: look for swapped ends, columns "
        "in place of rows, or positions that are used without offsets. If only cell gradients "
        "differ, they ignore that atoms may lie outside the cell.",
    )


def _batches(trial: Trial) -> Iterator[Finding]:
    graph = trial.graph
    requirement = "systems of a batch do not interact"
    n, b, e = check_graph(graph)
    capacity = trial.model.capacity
    needed = (2 * n + 1, 2 * e, 2 * b + 1)
    if capacity and any(have < need for have, need in zip(capacity, needed, strict=True)):
        trial.notes.append(f"not checked: {requirement}; two graphs exceed the package's capacity")
        return
    change = trial.random.normal(size=graph.positions.shape) * trial.real[:, None]
    other = trial.array(np.asarray(graph.positions, float) + trial.rounded(0.05 * change))
    element = _elements.another(trial)
    numbers = graph.atomic_numbers
    if element is not None:
        numbers = jnp.full_like(numbers, element)
    alone = trial.run(replace(graph, positions=other, atomic_numbers=numbers))
    pair = replace(
        graph,
        positions=jnp.stack([graph.positions, other]),
        atomic_numbers=jnp.stack([graph.atomic_numbers, numbers]),
    )
    mapped: Any = jax.tree.map(lambda _: False, pair)
    mapped = replace(mapped, positions=True, atomic_numbers=True)
    out = trial.run(merge_graphs(pair, mapped, 2))
    halves = [jax.tree.map(lambda leaf, k=k: np.split(leaf, 2)[k], out) for k in (0, 1)]
    yield Finding(
        requirement,
        max(trial.deviation(halves[0]), trial.deviation(halves[1], alone)),
        trial.same,
        "Replicas would be coupled. Look for normalisations over the whole batch, for sums that "
        "ignore the system of an atom, and for tables built from the elements that are present.",
    )
