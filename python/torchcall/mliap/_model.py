"""A torch potential as JAX programs hold it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from torchcall._call.call import CallOptions, IndexCheck
from torchcall._call.narrowing import Axis, Narrowing
from torchcall._call.specs import torch_dtype
from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._input import AtomGraphInput, input_dtypes, output_specs
from torchcall.mliap._package import read_potential
from torchcall.mliap._species import unknown_element, wrapped_species
from torchcall.mliap._table import SystemId, Table


class TorchMliapForward(Protocol):
    """What a module has to be: a function of an `AtomGraphInput` of tensors.

    It returns a dict with

    - `energy` (B,), in eV;
    - `position_gradients` (N, 3), ∂E/∂r in eV/Å: gradients, not forces;
    - `cell_gradients` (B, 3, 3), ∂E/∂h in eV/Å at fixed Cartesian positions, when asked for.
    """

    def __call__(self, input: AtomGraphInput) -> dict[str, Any]:
        """Evaluates the potential."""
        ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cutoff"],
    meta_fields=["wrapper", "compute_cell_gradients", "narrow", "capacity"],
)
@dataclass(frozen=True)
class TorchMliap:
    """A potential: what calls its module, and how far its atoms see; a pytree.

    Attributes:
        cutoff: in Å, by system; one entry serves every system.
        wrapper: the module, static.
        compute_cell_gradients: whether the module returns `cell_gradients`, static.
        narrow: "auto" lets the module see as few padded rows as it needs, where that is possible;
            False always gives it the padded shapes. Static.
        capacity: (atoms, edges, systems), phantoms included, of a module that serves these shapes
            only; static.
    """

    cutoff: Table[SystemId, Float[Array, " B"]]
    wrapper: Any
    compute_cell_gradients: bool = False
    narrow: Literal["auto", False] = "auto"
    capacity: tuple[int, int, int] | None = None

    @classmethod
    def from_module(
        cls,
        module: Callable[..., Any] | str | Path,
        cutoff: float | Table[SystemId, Float[Array, " B"]],
        compute_cell_gradients: bool = False,
        *,
        narrow: Literal["auto", False] = "auto",
        capacity: tuple[int, int, int] | None = None,
        **options: Any,
    ) -> TorchMliap:
        """Wraps a module that obeys `TorchMliapForward`.

        Args:
            module: anything that `TorchModuleWrapper` takes.
            cutoff: in Å; a number for all systems.
            compute_cell_gradients: whether the module returns `cell_gradients`.
            narrow, capacity: see the attributes.
            **options: those of `TorchModuleWrapper`, but for the specs, which the form of a
                potential fixes. `requires_grad` is True unless given: potentials differentiate
                inside. Those that do not are faster with False.

        Raises:
            ValueError: the cutoff is not positive, or an option is wrong.
            TypeError: a spec was given, or the module is of a kind that cannot be called.
        """
        _refuse_specs("from_module", options)
        _check_narrow("from_module", narrow)
        wrapper = TorchModuleWrapper(
            module,
            input_spec=((input_dtypes(),), {}),
            **{"requires_grad": True, **options},
        )
        table = cutoff if isinstance(cutoff, Table) else _one_cutoff(cutoff)
        return cls(table, wrapper, compute_cell_gradients, narrow, capacity)

    @classmethod
    def from_package(
        cls, path: str | Path, *, narrow: Literal["auto", False] = "auto", **options: Any
    ) -> TorchMliap:
        """Wraps a package that `torchcall.mliap.compile` made, which states its cutoff and dtypes.

        Args:
            path: the `.pt2` file.
            narrow: see the attributes; a package of static shapes is never narrowed.
            **options: those of `TorchModuleWrapper`, but for the specs.

        Raises:
            FileNotFoundError, ValueError: the file is missing, damaged, or compiled for another
                torch, device or processor; or it was not made by `torchcall.mliap.compile`.
            TypeError: a spec was given.
        """
        package = read_potential(Path(path))
        _refuse_specs("from_package", options)
        _check_narrow("from_package", narrow)
        casts = {key: torch_dtype(dtype) for key, dtype in package.dtypes.items()}
        source: Any = package.source
        return cls(
            _one_cutoff(package.cutoff),
            TorchModuleWrapper(source, input_spec=((casts,), {}), **options),
            package.compute_cell_gradients,
            narrow=narrow,
            capacity=package.capacity,
        )

    def call(self, input: AtomGraphInput) -> dict[str, Array]:
        """What the module returns for this input: no padding, no dropping.

        Args:
            input: floats in one dtype.

        Returns:
            `energy` (B,), `position_gradients` (N, 3) and, where asked for, `cell_gradients`
            (B, 3, 3), in the positions' dtype.

        Raises:
            TypeError, ValueError: something is missing or misshapen; the message names it.
            jax.errors.JaxRuntimeError: likewise, where only the call itself can tell.
        """
        if not isinstance(self.wrapper, TorchModuleWrapper):  # any function of the input
            return self.checked(input, self.wrapper(input))
        error = unknown_element(self.species, input.get("atomic_numbers", ()), None, 0)
        if error:
            raise ValueError(f"torchcall: {self._name}: input['atomic_numbers']: {error}")
        options = CallOptions(self.output_specs(input), index_checks=self._index_checks(input))
        return self.wrapper._call((input,), {}, options)

    def evaluate(
        self, input: AtomGraphInput, n_atoms: Int[ArrayLike, ""], n_edges: Int[ArrayLike, ""]
    ) -> dict[str, Array]:
        """`call` for a padded graph of which the module need not see all.

        With `narrow="auto"`, it gets the valid rows and one phantom, at least two in all: rows cost
        what they cost, capacities nothing. Rows of the result that it has not seen are zero. On a
        GPU to read a length would mean to wait, so the module sees all rows there; those that it
        would not have seen on a CPU are zero all the same.

        Args:
            input: valid atoms and edges first, in the form that `pad_graph` gives.
            n_atoms, n_edges: how many of them are valid.

        Raises:
            TypeError, ValueError, jax.errors.JaxRuntimeError: as `call`.
        """
        fixed = self.narrow is False or self.capacity is not None
        if fixed or not isinstance(self.wrapper, TorchModuleWrapper):
            return self.call(input)
        outputs = self.output_specs(input)
        checks = self._index_checks(input)
        options = CallOptions(outputs, _narrowing(tuple(outputs)), checks)
        lengths = [jnp.asarray(n, jnp.int32) for n in (n_atoms, n_edges)]
        out = self.wrapper._call((input,), {}, options, lengths)
        gradients = out["position_gradients"]
        out["position_gradients"] = jax.lax.platform_dependent(
            gradients, lengths[0], cpu=lambda rows, _: rows, default=_zero_unseen
        )
        return out

    def output_specs(self, input: AtomGraphInput) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the outputs that the form of a potential names."""
        return output_specs(input, compute_cell_gradients=self.compute_cell_gradients)

    def checked(self, input: AtomGraphInput, out: Any) -> dict[str, Array]:
        """The outputs that the form of a potential names, if they are all there."""
        name = self._name
        if not isinstance(out, dict):
            raise TypeError(
                f"torchcall: {name}: output: expected a dict with 'energy' and "
                f"'position_gradients', got {type(out).__name__}"
            )
        result: dict[str, Array] = {}
        specs = self.output_specs(input)
        for key, spec in specs.items():
            if key not in out:
                raise ValueError(
                    f"torchcall: {name}: output ['{key}']: expected this key, got {sorted(out)}"
                )
            if out[key].shape != spec.shape:
                raise ValueError(
                    f"torchcall: {name}: output ['{key}']: expected shape {spec.shape}, "
                    f"got {out[key].shape}"
                )
            result[key] = out[key].astype(spec.dtype)
        return result

    @property
    def species(self) -> tuple[int, ...] | None:
        """The atomic numbers that the module declares, ascending; None if it declares none.

        Read once from the module's attribute or buffer `species` or `atomic_numbers`, or from the
        package's metadata. Another element is an error in every engine: before the call where the
        numbers are concrete, otherwise in the call. A call on a GPU would have to wait for the
        numbers, so traced numbers are checked on CPUs only.
        """
        return wrapped_species(self.wrapper)

    @property
    def _name(self) -> str:
        if isinstance(self.wrapper, TorchModuleWrapper):
            return self.wrapper._name
        return getattr(self.wrapper, "__name__", type(self.wrapper).__name__)

    def _index_checks(self, input: AtomGraphInput) -> tuple[IndexCheck, ...]:
        """Edges join atoms, atoms belong to systems, elements are declared."""
        operand = {key: k for k, key in enumerate(sorted(input))}
        checks = [
            IndexCheck(operand[key], operand[rows])
            for key, rows in (("edge_index", "pos"), ("batch", "cell"))
            if key in operand and rows in operand
        ]
        # The native set has 128 members.
        if self.species and self.species[-1] < 128 and "atomic_numbers" in operand:
            checks.append(IndexCheck.members(operand["atomic_numbers"], self.species))
        return tuple(checks)

    def check_species(self, graph: AtomGraph) -> None:
        """Compares concrete atomic numbers with the elements that the module declares.

        Raises:
            ValueError: naming the first atom of another element.
        """
        n_systems = graph.cell.shape[0]
        error = unknown_element(self.species, graph.atomic_numbers, graph.batch, n_systems)
        if error:
            raise ValueError(
                f"torchcall: {self._name}: graph.atomic_numbers: {error}; the model does not "
                "declare this element in its `species`"
            )

    def check_cutoff(self, graph: AtomGraph) -> None:
        """Compares with the cutoff of the graph's neighbour list, where both are known.

        Raises:
            ValueError: they differ. A shorter list lacks pairs; a longer one holds pairs that the
                form of a potential excludes.
        """
        cutoff = self.cutoff.data
        if graph.list_cutoff is None or isinstance(cutoff, Tracer):
            return
        largest, listed = float(np.max(np.asarray(cutoff))), graph.list_cutoff
        if abs(largest - listed) <= 1e-6 * listed:
            return
        what = "lacks pairs" if listed < largest else "holds pairs beyond it"
        raise ValueError(
            f"torchcall: cutoff: expected a neighbour list of the model's cutoff {largest:g} Å, "
            f"got one of {listed:g} Å, which {what}"
        )


def _zero_unseen(rows: Array, n_atoms: Array) -> Array:
    seen = jnp.arange(rows.shape[0], dtype=jnp.int32) < jnp.maximum(n_atoms + 1, 2)
    return jnp.where(seen[:, None], rows, jnp.zeros_like(rows))


def _narrowing(outputs: tuple[str, ...]) -> Narrowing:
    atoms, edges = Axis(0, 0), Axis(1, 0)
    inputs = {
        "pos": atoms,
        "atomic_numbers": atoms,
        "batch": atoms,
        "edge_index": Axis(1, 1),
        "cell_offsets": edges,
    }
    return Narrowing(
        names=("n_atoms", "n_edges"),
        # In the order of a dict's leaves.
        inputs=tuple(inputs.get(key) for key in sorted(AtomGraphInput.__annotations__)),
        outputs={key: atoms if key == "position_gradients" else None for key in outputs},
    )


def _refuse_specs(method: str, options: dict[str, Any]) -> None:
    for name in ("input_spec", "output_spec"):
        if name in options:
            raise TypeError(
                f"torchcall: TorchMliap.{method}: {name} follows from the form of a potential; "
                "pass TorchMliap(cutoff, wrapper) a wrapper of your own instead"
            )


def _check_narrow(method: str, narrow: object) -> None:
    if narrow not in ("auto", False):
        raise ValueError(
            f"torchcall: TorchMliap.{method}: narrow: expected 'auto' or False, got {narrow!r}"
        )


def _one_cutoff(cutoff: float) -> Table[SystemId, Array]:
    if not 0 < cutoff < float("inf"):
        raise ValueError(
            f"torchcall: TorchMliap: cutoff: expected a positive length in Å, got {cutoff}"
        )
    return Table((SystemId(0),), jnp.asarray([cutoff], float))
