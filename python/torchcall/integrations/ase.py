"""A calculator for ASE: `atoms.calc = Calculator(model)`."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np
import torch
from ase.calculators import calculator
from ase.stress import full_3x3_to_voigt_6_stress

from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap import (
    AtomGraph,
    NeighborList,
    TorchMliap,
    energy_and_gradients,
    geometry_from_ase,
    neighbor_list,
    virial_from_lattice_gradient,
)
from torchcall.mliap._adapters import Geometry


class Calculator(calculator.Calculator):
    """Energy in eV, forces in eV/Å and stress in eV/Å³ of a potential, for ASE.

    The stress is ASE's: σ = +(1/V) dE/dε, in Voigt order xx, yy, zz, yz, xz, xy. It needs a model
    that computes cell gradients and a cell of three vectors; else requesting it raises ASE's
    `PropertyNotImplementedError`. So does requesting energies per atom, which potentials do not
    return. `free_energy` is the energy.

    The model is compiled for one number of atoms and one capacity of the neighbour list: again
    when the number of atoms changes, or when there are more neighbours than the capacity.
    Positions, cells, elements and images of a path (NEB) may change freely. A model with
    `threads="auto"` then measures how many torch threads are best.

    Charge and spin are those of `torchcall.mliap.geometry_from_ase`: `atoms.info["charge"]` and
    `["spin"]`, or the initial charges and magnetic moments.

    Args:
        model: the potential.
        dtype: of positions and results. float64 needs no setting of JAX; the model computes in the
            precision of its weights.
        skin: in Å; the neighbour list is searched again when atoms have moved by half of it.
        capacity_multiplier: the list's capacity, in units of the first structure's neighbours.
        **options: those of ASE's calculators, such as `atoms` and `label`.

    Raises:
        TypeError, ValueError: an argument is wrong.
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress"]  # noqa: RUF012

    def __init__(
        self,
        model: TorchMliap,
        *,
        dtype: Literal["float32", "float64"] = "float64",
        skin: float = 0.5,
        capacity_multiplier: float = 1.25,
        **options: Any,
    ) -> None:
        if not isinstance(model, TorchMliap):
            raise TypeError(
                f"torchcall: Calculator: model: expected a TorchMliap, got a "
                f"{type(model).__name__}; torchcall.models.load makes one"
            )
        if dtype not in ("float32", "float64"):
            raise ValueError(
                f"torchcall: Calculator: dtype: expected 'float32' or 'float64', got {dtype!r}"
            )
        self._model = model
        self._dtype = np.dtype(dtype)
        cutoff = float(np.max(np.asarray(model.cutoff.data)))
        self._lists = neighbor_list(cutoff, skin=skin, capacity_multiplier=capacity_multiplier)
        self._list: NeighborList | None = None
        self._charge_and_spin: tuple[Any, Any] | None = None
        wrapper = model.wrapper
        self._measures_threads = (
            isinstance(wrapper, TorchModuleWrapper) and wrapper.stats()["threads"] == "auto"
        )
        super().__init__(**options)

    def calculate(
        self,
        atoms: Any = None,
        properties: Any = ("energy",),
        system_changes: Any = calculator.all_changes,
    ) -> None:
        """Computes every property, in one evaluation.

        Args:
            atoms: the structure.
            properties: ignored.
            system_changes: ignored.

        Raises:
            ValueError: a position or the cell is not finite, a periodic axis has no lattice vector,
                or the model does not know an element.
        """
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        geometry = geometry_from_ase(atoms, dtype=self._dtype)
        for name, values in (("positions", geometry.positions), ("cell", geometry.cell)):
            if not np.isfinite(values).all():
                raise ValueError(
                    f"torchcall: Calculator: {name}: expected finite values, got NaN or infinity"
                )
        with jax.enable_x64(self._dtype == np.float64):
            old, neighbors = self._list, self._updated_list(geometry)
            self._list = neighbors
            graph = AtomGraph.from_neighbors(
                neighbors,
                jax.numpy.asarray(geometry.positions),
                jax.numpy.asarray(geometry.cell),
                jax.numpy.asarray(atoms.numbers.astype(np.int32)),
                charge=jax.numpy.asarray(geometry.charge),
                spin=jax.numpy.asarray(geometry.spin),
            )
            if self._measures_threads and _shapes(neighbors) != _shapes(old):
                self._model.warmup(graph)
            out = jax.device_get(energy_and_gradients(self._model, graph))
        energy = float(out.energy[0])
        forces = -np.asarray(out.position_gradients, np.float64)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        if out.cell_gradients is not None and atoms.cell.rank == 3:
            virial = _virial(forces, geometry, out.cell_gradients)
            self.results["stress"] = full_3x3_to_voigt_6_stress(virial / atoms.get_volume())
        self._charge_and_spin = _charge_and_spin(atoms)

    def get_property(self, name: str, atoms: Any = None, allow_calculation: bool = True) -> Any:
        """ASE's, with the reason where a property is not available."""
        try:
            return super().get_property(name, atoms, allow_calculation)
        except calculator.PropertyNotImplementedError as error:
            raise calculator.PropertyNotImplementedError(
                f"torchcall: Calculator: {name}: {self._reason(name)}"
            ) from error

    def check_state(self, atoms: Any, tol: float = 1e-15) -> list[str]:
        """What has changed since the last calculation; charge and spin are found in `info`, too."""
        changes = super().check_state(atoms, tol=tol)
        if not changes and self._charge_and_spin not in (None, _charge_and_spin(atoms)):
            changes.append("initial_charges")
        return changes

    def _updated_list(self, geometry: Geometry) -> NeighborList:
        old = self._list
        if (
            old is None
            or len(old.positions) != len(geometry.positions)
            or (np.asarray(old.pbc) != geometry.pbc).any()
        ):
            return self._lists.allocate(*geometry)
        new = old.update(geometry.positions, geometry.cell)
        return new.grow() if bool(new.did_overflow) else new

    def _reason(self, name: str) -> str:
        if name != "stress":
            return f"expected one of {', '.join(self.implemented_properties)}"
        if not self._model.compute_cell_gradients:
            return "expected a model that computes cell gradients, got one without"
        return "expected a cell of three linearly independent vectors, got another"


def _shapes(neighbors: NeighborList | None) -> tuple[Any, ...]:
    if neighbors is None:
        return ()
    return neighbors.positions.shape, neighbors.edge_index.shape


def _virial(forces: np.ndarray, geometry: Geometry, cell_gradients: Any) -> np.ndarray:
    """dE/dε (3, 3) in eV; computed in torch, which compiles nothing."""

    def tensor(values: Any, dtype: Any = np.float64) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype))

    return virial_from_lattice_gradient(
        tensor(forces),
        tensor(geometry.positions),
        tensor(geometry.batch, np.int64),
        tensor(geometry.cell),
        tensor(cell_gradients),
        tensor(geometry.pbc, np.bool_),
    )[0].numpy()


def _charge_and_spin(atoms: Any) -> tuple[Any, Any]:
    return atoms.info.get("charge"), atoms.info.get("spin")
