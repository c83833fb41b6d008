"""Checks on given atoms that a potential has the properties that simulations require."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from torchcall.mliap._energy import EnergyAndGradients, energy_and_gradients
from torchcall.mliap._graph import AtomGraph, check_graph, pad_graph
from torchcall.mliap._merge import merge_graphs
from torchcall.mliap._model import TorchMliap

# Fourth-order central differences: (f₋₂ − 8 f₋₁ + 8 f₁ − f₂) / 12 h.
_STENCIL = ((1, 8 / 12), (-1, -8 / 12), (2, -1 / 12), (-2, 1 / 12))
_DIRECTIONS = 3


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        requirement: the property that was checked.
        error: largest deviation, relative to the size of the compared values.
        tolerance: deviation that rounding and finite differences explain.
        advice: consequence of a failure in a simulation, and likely causes.
    """

    requirement: str
    error: float
    tolerance: float
    advice: str

    @property
    def passed(self) -> bool:
        """Whether the deviation is within the tolerance; false for NaN."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        line = f"{'ok  ' if self.passed else 'FAIL'} {self.requirement}: error {self.error:.1e}"
        if self.passed:
            return line
        return f"{line}, expected at most {self.tolerance:.1e}\n     {self.advice}"


@dataclass(frozen=True)
class CheckReport:
    """Report of `check_model`; readable with `print`.

    Attributes:
        findings: one for each check.
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(finding.passed for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The checks that failed."""
        return tuple(finding for finding in self.findings if not finding.passed)

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def check_model(model: TorchMliap, graph: AtomGraph, *, seed: int = 0) -> CheckReport:
    """Checks on these atoms the properties that simulations require; outside `jit`.

    Compares gradients with fourth-order finite differences along random directions at fixed edges.
    Then changes padding, the order of atoms, their images, and the batch, and translates and
    rotates the system: results must not change, except that gradients rotate. float64 detects much
    smaller errors than float32.

    Args:
        model: the potential.
        graph: realistic data: atoms that interact, none of them at a symmetric site, with all
            edges up to the model's cutoff. Include systems of every kind that the model will serve.
        seed: seed of directions, rotations and permutations.

    Returns:
        The report. A failed check is a finding, not an exception. A model that cannot be called
        raises.
    """
    check_graph(graph)
    model.check_cutoff(graph)
    model.check_species(graph)
    return CheckReport(tuple(_Trial(model, graph, seed).findings()))


class _Trial:
    def __init__(self, model: TorchMliap, graph: AtomGraph, seed: int) -> None:
        self.model, self.graph = model, replace(graph, list_cutoff=None)
        self.random = np.random.default_rng(seed)
        self.evaluate = jax.jit(energy_and_gradients)
        self.out = self.run(self.graph)
        n_systems = graph.cell.shape[0]
        batch = np.zeros(len(graph.positions), int) if graph.batch is None else graph.batch
        self.batch = np.asarray(batch)
        self.real = (self.batch >= 0) & (self.batch < n_systems)
        eps = float(np.finfo(graph.positions.dtype).eps)
        # Energies are sums over atoms: their rounding errors scale with their size.
        self.same = 2e3 * eps
        self.step = eps**0.2 * 0.25
        self.difference = 1e-8 if eps < 1e-10 else 1e-2
        self.rounding = 20 * eps
        force = float(np.sqrt(np.mean(np.square(self.out.position_gradients)))) + 1e-30
        self.size = float(np.abs(self.out.energy).max(initial=0)) + force

    def run(self, graph: AtomGraph) -> EnergyAndGradients:
        return jax.tree.map(np.asarray, self.evaluate(self.model, graph))

    def array(self, values: np.ndarray) -> jax.Array:
        return jnp.asarray(np.asarray(values, self.graph.positions.dtype))

    def findings(self) -> Iterator[Finding]:
        """The findings, the basic ones first."""
        bad = sum(int((~np.isfinite(leaf)).sum()) for leaf in jax.tree.leaves(self.out))
        yield Finding(
            "energies and gradients are finite",
            float(bad),
            0.0,
            "NaN and infinity reach every atom within a step. Look for coincident atoms, divisions "
            "by zero in systems without edges, and square roots at zero.",
        )
        if bad:
            return
        yield self.positions()
        if self.out.cell_gradients is not None:
            yield self.cells()
        yield self.padding()
        yield self.permutation()
        yield self.translation()
        yield self.rotation()
        yield self.images()
        yield self.batches()

    def positions(self) -> Finding:
        moves = self.random.normal(size=(_DIRECTIONS, *self.graph.positions.shape))
        moves *= self.real[:, None]
        gradients = self.out.position_gradients.astype(float)
        error = self.slope_error(moves, "positions", np.einsum("nk,dnk->d", gradients, moves))
        return Finding(
            "position_gradients are the derivatives of the energy",
            error,
            self.difference,
            "Energy is not conserved and relaxations stall. An error of 2 means that forces were "
            "returned, which have the opposite sign. Otherwise look for a detached tensor, or for "
            "an energy that does not go to zero at the cutoff.",
        )

    def cells(self) -> Finding:
        moves = self.random.normal(size=(_DIRECTIONS, *self.graph.cell.shape))
        moves *= (np.asarray(self.graph.cell) != 0).any(-1)[:, :, None]
        assert self.out.cell_gradients is not None
        gradients = self.out.cell_gradients.astype(float)
        error = self.slope_error(moves, "cell", np.einsum("bkl,dbkl->d", gradients, moves))
        return Finding(
            "cell_gradients are the derivatives by the lattice vectors at fixed positions",
            error,
            self.difference,
            "Pressures and cell relaxations are wrong. If the module returns a virial, convert it "
            "with lattice_gradient_from_virial.",
        )

    def slope_error(self, moves: np.ndarray, field: str, expected: np.ndarray) -> float:
        """Largest difference between finite differences along directions and the given slopes."""
        start = np.asarray(getattr(self.graph, field), float)
        worst = scale = 0.0
        for move, slope in zip(moves, expected, strict=True):
            found = 0.0
            for k, weight in _STENCIL:
                moved = self.array(start + k * self.step * move)
                # Subtract the initial energies first: totals may be large.
                change = self.run(replace(self.graph, **{field: moved})).energy - self.out.energy
                found += weight * float(change.astype(float).sum()) / self.step
            worst = max(worst, abs(found - float(slope)))
            scale = max(scale, abs(found), abs(float(slope)))
        floor = self.rounding * self.size / self.step / self.difference
        return worst / max(scale, floor, 1e-30)

    def padding(self) -> Finding:
        n, b, e = check_graph(self.graph)
        results = []
        for more in (0, 7):
            sizes = self.model.capacity or (
                max(2, n + 1) + more,
                max(2, e) + 5 * more,
                max(2, b + 1),
            )
            names = ("n_atoms", "n_edges", "n_systems")
            padded, masks = pad_graph(
                self.graph, cutoff=self.model.cutoff, **dict(zip(names, sizes, strict=True))
            )
            out = self.model.call(padded)
            results.append((out["energy"][:b], out["position_gradients"][masks.rows]))
        error = max(self.deviation(x, y) for x, y in zip(*results, strict=True))
        return Finding(
            "padded atoms and edges do not change results",
            error,
            self.same,
            "Results would depend on capacities, which vary during a run. Look for sums or means "
            "over all atoms or edges instead of those of each system, and for edges beyond the "
            "cutoff that contribute.",
        )

    def permutation(self) -> Finding:
        n = len(self.batch)
        order = self.random.permutation(n)
        rows = np.empty(n, int)
        rows[order] = np.arange(n)
        index = np.asarray(self.graph.edge_index)
        known = (index >= 0) & (index < n)
        moved = np.where(known, rows[np.where(known, index, 0)], n) if n else index
        shuffled = replace(
            self.graph,
            positions=self.graph.positions[order],
            atomic_numbers=self.graph.atomic_numbers[order],
            batch=jnp.asarray(self.batch[order].astype(np.int32)),
            edge_index=jnp.asarray(moved.astype(index.dtype)),
        )
        out = self.run(shuffled)
        error = max(
            self.deviation(out.energy, self.out.energy),
            self.deviation(out.position_gradients, self.out.position_gradients[order]),
        )
        return Finding(
            "the order of atoms does not change results",
            error,
            self.same,
            "Results would depend on the order of atoms in the file. Look for operations along "
            "the atoms' axis other than sums over edges and systems.",
        )

    def translation(self) -> Finding:
        shift = self.random.uniform(-1, 1, 3)
        moved = self.array(np.asarray(self.graph.positions, float) + shift)
        out = self.run(replace(self.graph, positions=moved))
        error = max(
            self.deviation(out.energy, self.out.energy),
            self.deviation(out.position_gradients, self.out.position_gradients),
        )
        return Finding(
            "translations do not change results",
            error,
            self.same,
            "Momentum is not conserved. Look for positions that are not used as differences.",
        )

    def rotation(self) -> Finding:
        q, _ = np.linalg.qr(self.random.normal(size=(3, 3)))
        q *= np.sign(np.linalg.det(q))
        rotated = replace(
            self.graph,
            positions=self.array(np.asarray(self.graph.positions, float) @ q),
            cell=self.array(np.asarray(self.graph.cell, float) @ q),
        )
        out = self.run(rotated)
        error = max(
            self.deviation(out.energy, self.out.energy),
            self.deviation(out.position_gradients, self.out.position_gradients @ q),
        )
        return Finding(
            "rotations do not change energies, and rotate gradients",
            error,
            self.same,
            "Angular momentum is not conserved. Lattice gradients from virials are wrong, because "
            "they assume this invariance. Models that learnt it from data have it approximately.",
        )

    def images(self) -> Finding:
        cell, pbc = np.asarray(self.graph.cell, float), np.asarray(self.graph.pbc)
        n = len(self.batch)
        system = np.where(self.real, self.batch, 0)
        steps = self.random.integers(-1, 2, (n, 3)) * self.real[:, None]
        steps = steps * (pbc[system] if len(pbc) else 0)
        shift = np.einsum("nk,nkl->nl", steps, cell[system]) if n else np.zeros((0, 3))
        index = np.asarray(self.graph.edge_index)
        known = ((index >= 0) & (index < n)).all(0)
        i, j = np.where(known, index, 0)
        change = (steps[i] - steps[j]) * np.expand_dims(known, 1) if n else 0
        offsets = np.asarray(self.graph.cell_offsets)
        out = self.run(
            replace(
                self.graph,
                positions=self.array(np.asarray(self.graph.positions, float) + shift),
                cell_offsets=jnp.asarray((offsets + change).astype(offsets.dtype)),
            )
        )
        error = max(
            self.deviation(out.energy, self.out.energy),
            self.deviation(out.position_gradients, self.out.position_gradients),
        )
        return Finding(
            "periodic images of atoms do not change results",
            error,
            self.same,
            "The energy would jump when an atom crosses a face of the cell. The vector of an edge "
            "is pos[receiver] - pos[sender] + cell_offsets @ cell: look for swapped ends, columns "
            "in place of rows, or positions that are used without offsets.",
        )

    def batches(self) -> Finding:
        other = np.asarray(self.graph.positions, float)
        other = other + 0.05 * self.random.normal(size=other.shape)
        pair = replace(self.graph, positions=jnp.stack([self.graph.positions, self.array(other)]))
        alone = self.run(replace(self.graph, positions=pair.positions[1]))
        mapped: Any = jax.tree.map(lambda _: False, pair)
        out = self.run(merge_graphs(pair, replace(mapped, positions=True), 2))
        error = max(
            self.deviation(out.energy, np.concatenate([self.out.energy, alone.energy])),
            self.deviation(
                out.position_gradients,
                np.concatenate([self.out.position_gradients, alone.position_gradients]),
            ),
        )
        return Finding(
            "systems of a batch do not interact",
            error,
            self.same,
            "Replicas would be coupled. Look for normalisations over the whole batch, and for sums "
            "that ignore the system of an atom.",
        )

    def deviation(self, found: Any, expected: Any) -> float:
        """Largest difference, relative to the size of energies and forces."""
        found, expected = np.asarray(found, float), np.asarray(expected, float)
        if not np.isfinite(found).all():
            return float("inf")
        scale = max(self.size, float(np.abs(expected).max(initial=0)))
        return float(np.abs(found - expected).max(initial=0)) / scale
