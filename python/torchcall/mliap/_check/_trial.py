"""One model on one graph: exact geometries, evaluations, and measured rounding errors."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from torchcall.mliap._check._report import Finding
from torchcall.mliap._energy import energy_and_gradients
from torchcall.mliap._graph import AtomGraph, lacks_edges, without_list
from torchcall.mliap._model import TorchMliap

# Images by which atoms are displaced at most: far ones only add rounding errors.
_FARTHEST = 16


class Results(NamedTuple):
    """`EnergyAndGradients` as NumPy arrays in float64."""

    energy: np.ndarray
    position_gradients: np.ndarray
    cell_gradients: np.ndarray | None


class Trial:
    """Evaluations of a model at a graph and at changed copies of it, all of the same shapes.

    The graph is centred, its atoms are wrapped, and positions and cells are rounded to multiples of
    `quantum`. For all positions, offsets and displacements in use, `x_j − x_i + S h` is then exact
    in the positions' dtype: finite differences contain no rounding errors of the geometry.
    """

    def __init__(self, model: TorchMliap, graph: AtomGraph, seed: int) -> None:
        self.model = model
        self.random = np.random.default_rng(seed)
        self.notes: list[str] = []
        self.dtype = np.dtype(graph.positions.dtype)
        n, b, e = len(graph.positions), graph.cell.shape[0], graph.edge_index.shape[1]
        batch = np.zeros(n, int) if graph.batch is None else np.asarray(graph.batch)
        self.real = (batch >= 0) & (batch < b)
        self.batch = np.where(self.real, batch, b)
        self.system = np.where(self.real, batch, 0)
        self.n_systems = b
        index = np.asarray(graph.edge_index)
        count = e if graph.n_edges is None else int(np.asarray(graph.n_edges))
        self.used = ((index >= 0) & (index < n)).all(0) & (np.arange(e) < count)
        self.index = np.where(self.used, index, 0)
        self._wrap(graph)
        self._evaluate = jax.jit(energy_and_gradients)
        self.out = self.run(self.graph)
        # Checks of derivatives clear it: wrong cell gradients are reported once.
        self.cells_are_sound = True
        self.is_finite = all(bool(np.isfinite(leaf).all()) for leaf in _leaves(self.out))
        if self.is_finite:
            self._measure_rounding()

    def _wrap(self, graph: AtomGraph) -> None:
        n, b = len(self.batch), self.n_systems
        x, cell = np.asarray(graph.positions, float), np.asarray(graph.cell, float)
        periodic = np.asarray(graph.pbc)[:, :, None]
        inverse = np.linalg.pinv(np.where(periodic, cell, 0)) if b else cell
        images = np.zeros((n, 3))
        if b:
            centre = np.stack(
                [x[self.batch == s].mean(0) if (self.batch == s).any() else np.zeros(3)
                 for s in range(b)]
            )  # fmt: skip
            x = x - centre[self.system]
            fractional = np.einsum("nk,nkl->nl", x, inverse[self.system])
            images = np.round(fractional) * self.real[:, None]
            # Padding atoms may hold anything.
            x = np.where(self.real[:, None], x, 0.0)
        self.images = np.clip(images, -_FARTHEST, _FARTHEST)
        i, j = self.index
        offsets = np.asarray(graph.cell_offsets, float)
        change = (images[j] - images[i]) * self.used[:, None] if n else np.zeros_like(offsets)
        offsets = offsets + change
        by_edge = np.where(self.used[:, None], np.abs(offsets), 0)
        self.largest_offset = max(1.0, float(by_edge.max(initial=0)))

        wrapped = x - (np.einsum("nk,nkl->nl", images, cell[self.system]) if b else 0.0)
        lengths = np.abs(cell).sum(1).max(initial=0)  # bounds |h| of one axis, summed
        far = float(np.abs(self.images).max(initial=0)) + 1
        reach = float(np.abs(wrapped).max(initial=0)) + (self.largest_offset + 4 * far) * lengths
        bits = np.finfo(self.dtype).nmant
        self.quantum = 2.0 ** (np.ceil(np.log2(reach + 2)) - bits)
        self.graph = replace(
            without_list(graph),
            positions=self.array(self.rounded(wrapped)),
            cell=self.array(self.rounded(cell)),
            cell_offsets=self.array(offsets),
            batch=jnp.asarray(self.batch.astype(np.int32)),
            # The checks move atoms at fixed edges.
            did_overflow=lacks_edges(graph),
        )

    def rounded(self, values: np.ndarray) -> np.ndarray:
        """The values as multiples of the quantum."""
        return np.round(values / self.quantum) * self.quantum

    def array(self, values: np.ndarray) -> jax.Array:
        """The values in the positions' dtype."""
        return jnp.asarray(np.asarray(values, self.dtype))

    def run(self, graph: AtomGraph) -> Results:
        """Energies and gradients in float64, of a graph with the shapes of `self.graph`."""
        out = self._evaluate(self.model, graph)
        return Results(*jax.tree.map(lambda leaf: np.asarray(leaf).astype(float), tuple(out)))

    def moved(self, field: str, change: np.ndarray) -> Results:
        """Results where positions or cells are changed by multiples of the quantum."""
        start = np.asarray(getattr(self.graph, field), float)
        return self.run(replace(self.graph, **{field: self.array(start + change)}))

    def directions(self, field: str, count: int) -> np.ndarray:
        """Directions in which no component exceeds 1.7: along the gradients, then random ones.

        Returns:
            (count, n, 3) or (count, b, 3, 3), zero for padding atoms and for vectors of zero.
        """
        if field == "positions":
            gradients, system, free = self.out.position_gradients, self.batch, self.real[:, None]
        else:
            gradients, system = self.out.cell_gradients, np.arange(self.n_systems)
            free = (np.asarray(self.graph.cell) != 0).any(-1)[:, :, None]
        assert gradients is not None
        bound = 3**0.5
        result = self.random.uniform(-bound, bound, (count, *gradients.shape))
        for s in range(self.n_systems):
            own = gradients[system == s]
            largest = np.abs(own).max(initial=0)
            if largest > 0:
                result[0, system == s] = own * (bound / largest)
        return result * free

    def slopes(self, field: str, gradients: Results, moves: np.ndarray) -> np.ndarray:
        """Σ gradient · move of each system, (directions, b)."""
        if field == "cell":
            assert gradients.cell_gradients is not None
            return np.einsum("bkl,dbkl->db", gradients.cell_gradients, moves)
        per_atom = np.einsum("nk,dnk->dn", gradients.position_gradients, moves)
        member = self.batch[:, None] == np.arange(self.n_systems)
        return per_atom @ member

    def _measure_rounding(self) -> None:
        """Errors of energies and gradients that rounding explains, by system."""
        eps = float(np.finfo(self.dtype).eps)
        total = np.abs(self.out.energy)
        self.force = self._norm(self.out.position_gradients)
        # Fourth differences at a small step: what remains of a smooth energy is noise.
        step = 1e-5 if eps < 1e-10 else 2.0**-8
        self.noise = np.zeros_like(total)
        for move in self.rounded(step * self.directions("positions", 3)[1:]):
            values = [self.moved("positions", k * move).energy for k in (-2, -1, 1, 2)]
            left, near_left, near_right, right = (v - self.out.energy for v in values)
            fourth = np.abs(left - 4 * near_left - 4 * near_right + right) / 70**0.5
            self.noise = np.maximum(self.noise, fourth)
        size = total + self.force + 1e-30
        self.resolution = float((self.noise / size).max(initial=0))
        self.noise = np.maximum(self.noise, eps * total / 2)
        self.is_precise = self.resolution <= (1e-11 if eps < 1e-10 else 1e-4)
        # A module that computes in a lower precision is checked in that precision.
        single = float(np.finfo(np.float32).eps)
        self.eps = eps if self.is_precise else max(single, self.resolution)
        self.same = min(2e3 * self.eps, 0.05)
        # What changes of the size of rounding errors do to the results.
        size = max(self.quantum, self.eps * float(np.abs(self.graph.positions).max(initial=1)))
        self.spread = [np.zeros_like(leaf) for leaf in self._scales(self.out)]
        for _ in range(2):
            positions, cell = (
                np.asarray(array, float) for array in (self.graph.positions, self.graph.cell)
            )
            by_atom = self.random.uniform(-2 * size, 2 * size, positions.shape)
            # Also where positions do not matter, as in a crystal of one atom.
            by_cell = self.random.uniform(-2 * size, 2 * size, cell.shape) / self.largest_offset
            by_cell *= (cell != 0).any(-1)[:, :, None]
            near = self.run(
                replace(
                    self.graph,
                    positions=self.array(positions + self.rounded(by_atom * self.real[:, None])),
                    cell=self.array(cell + self.rounded(by_cell)),
                )
            )
            for k, (a, b) in enumerate(zip(_leaves(near), _leaves(self.out), strict=True)):
                worst = self._worst(np.abs(a - b), k)
                self.spread[k] = np.maximum(self.spread[k], worst)

    def _norm(self, gradients: np.ndarray) -> np.ndarray:
        member = self.batch[:, None] == np.arange(self.n_systems)
        return np.sqrt(np.square(gradients).sum(1) @ member)

    def _worst(self, values: np.ndarray, leaf: int) -> np.ndarray:
        """Largest value of each system; `leaf` counts energy, position and cell gradients."""
        if leaf == 0:
            return values
        system = self.batch if leaf == 1 else np.arange(self.n_systems)
        worst = np.zeros(self.n_systems)
        per_row = values.reshape(len(values), 3 ** (values.ndim - 1)).max(1, initial=0)
        np.maximum.at(worst, system[system < self.n_systems], per_row[system < self.n_systems])
        return worst

    def _scales(self, out: Results) -> list[np.ndarray]:
        """Size of energies, position gradients and cell gradients of each system."""
        return [self._worst(np.abs(leaf), k) for k, leaf in enumerate(_leaves(out))]

    def deviation(self, found: Results, expected: Results | None = None) -> float:
        """Largest difference, relative to the size of the values and to measured rounding."""
        expected = self.out if expected is None else expected
        if not all(np.isfinite(leaf).all() for leaf in _leaves(found)):
            return float("inf")
        result = 0.0
        pairs = zip(_leaves(found), _leaves(expected), self._scales(expected), strict=True)
        for k, (a, b, scale) in enumerate(pairs):
            if k == 2 and not self.cells_are_sound:
                continue
            worst = self._worst(np.abs(a - b), k)
            floor = 5 * self.spread[k] / self.same
            if k == 0:
                floor = floor + 8 * self.noise / self.same
            if k == 2:
                # Moments r ⊗ ∂E/∂r of atoms far from the origin cancel.
                floor = floor + self.moment(found)
            result = max(result, float((worst / (scale + floor + 1e-30)).max(initial=0)))
        return result

    def moment(self, out: Results) -> np.ndarray:
        """Size of Σ S ⊗ ∂E/∂r of each system, where atoms are up to some images away."""
        return self._norm(out.position_gradients) * (1 + np.abs(self.images).max(initial=0))

    def finite(self) -> Finding:
        """The finding that results are finite."""
        leaves = jax.tree.leaves(self.out)
        return Finding(
            "energies and gradients are finite",
            float(sum(int((~np.isfinite(leaf)).sum()) for leaf in leaves)),
            0.0,
            "NaN and infinity reach every atom within a step. Look for coincident atoms, divisions "
            "by zero in systems without edges, and square roots at zero.",
        )

    def repetition(self) -> Finding:
        """The finding that further calls return the same."""
        member = self.batch[:, None] == np.arange(self.n_systems)
        forces = self._worst(np.abs(self.out.position_gradients), 1)
        per_atom = np.abs(self.out.energy) / np.maximum(member.sum(0), 1)
        errors = [np.zeros(self.n_systems)]
        for again in (self.run(self.graph), self.run(self.graph)):
            change = np.abs(again.energy - self.out.energy)
            errors.append(change / (np.abs(self.out.energy) + forces + 1e-30))
            gradients = np.abs(again.position_gradients - self.out.position_gradients)
            errors.append(self._worst(gradients, 1) / (per_atom + forces + 1e-30))
        return Finding(
            "the same input gives the same results",
            float(np.max(errors, initial=0)),
            2e3 * float(np.finfo(self.dtype).eps),
            "Energy is not conserved. Look for dropout, a module in training mode, random numbers, "
            "and values that one call leaves for the next. The other checks allow for the change.",
        )

    def precision(self) -> Finding:
        """The finding that energies are as smooth as the positions' dtype allows."""
        single = self.dtype == np.float32
        return Finding(
            f"energies have the precision of {self.dtype}",
            self.resolution,
            1e-4 if single else 1e-11,
            f"Small displacements change the energy irregularly. A part of the model computes in "
            f"{'float16, bfloat16 or TF32' if single else 'float32'}: look for casts, constants "
            "and weights of that dtype. The other checks allow for this error.",
        )


def _leaves(out: Results) -> list[np.ndarray]:
    return [leaf for leaf in out if leaf is not None]
