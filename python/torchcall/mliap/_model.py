"""A torch potential as a JAX pytree."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from torchcall._call.specs import torch_dtype
from torchcall._compile._copy import training_part
from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap._calls import call_options, zero_narrowed
from torchcall.mliap._from_energy import Engine, Script, energy_source
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._input import AtomGraphInput, output_specs
from torchcall.mliap._outputs import check_outputs
from torchcall.mliap._package import read_potential
from torchcall.mliap._padding import PaddingMasks, pad_with
from torchcall.mliap._probe import check_wrapper, refuse_specs, wrapped
from torchcall.mliap._species import unknown_element, wrapped_species
from torchcall.mliap._table import SystemId, Table


class TorchMliapForward(Protocol):
    """Interface of a module: a function of an `AtomGraphInput` of tensors that returns a dict.

    The dict contains

    - `energy` (B,), in eV;
    - `position_gradients` (N, 3), ∂E/∂r in eV/Å: gradients, not forces;
    - `cell_gradients` (B, 3, 3), ∂E/∂h in eV/Å at fixed Cartesian positions, if requested.
    """

    def __call__(self, input: AtomGraphInput) -> dict[str, Any]:
        """Evaluates the potential."""
        ...


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cutoff"],
    meta_fields=["wrapper", "compute_cell_gradients", "narrow", "capacity", "_reuses_last"],
)
@dataclass(frozen=True)
class TorchMliap:
    """A potential: its module and its cutoff; a pytree.

    Attributes:
        cutoff: in Å, by system; one entry serves every system.
        wrapper: the module, static.
        compute_cell_gradients: whether the module returns `cell_gradients`, static.
        narrow: "auto" passes the module as few padded rows as possible; False always passes it the
            padded shapes. Static.
        capacity: (atoms, edges, systems), phantoms included, of a module for these shapes only;
            static.
    """

    cutoff: Table[SystemId, Float[Array, " B"]]
    wrapper: Any
    compute_cell_gradients: bool = False
    narrow: Literal["auto", False] = "auto"
    capacity: tuple[int, int, int] | None = None
    _reuses_last: bool = False

    def __post_init__(self) -> None:
        # Also runs when a pytree is rebuilt: a wrapper is checked only once.
        if isinstance(self.wrapper, TorchModuleWrapper):
            check_wrapper(self.wrapper, self.compute_cell_gradients, self.capacity)

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
        """Wraps a module with the interface `TorchMliapForward`.

        Args:
            module: anything that `TorchModuleWrapper` takes.
            cutoff: in Å; a number for all systems.
            compute_cell_gradients: whether the module returns `cell_gradients`.
            narrow, capacity: see the attributes.
            **options: options of `TorchModuleWrapper`, except `input_spec` and `output_spec`, which
                are fixed for potentials. The default of `requires_grad` is True: most potentials
                differentiate inside. False is faster for those that do not.

        Warns:
            UserWarning: a part of the module, such as a dropout, is in training mode, which changes
                its results. The module is used as it is.

        Raises:
            ValueError: the cutoff is not positive, or an option is wrong.
            TypeError: a spec is given, or the module cannot be called.
        """
        refuse_specs("from_module", options)
        _check_narrow("from_module", narrow)
        wrapper = wrapped(module, capacity, compute_cell_gradients, check=True, **options)
        if part := training_part(wrapper._inspected()):
            warnings.warn(
                f"torchcall: {wrapper._name}: expected a module in eval mode, got {part} in "
                "training mode, which changes its results; call .eval()",
                stacklevel=2,
            )
        table = cutoff if isinstance(cutoff, Table) else _one_cutoff(cutoff)
        return cls(table, wrapper, compute_cell_gradients, narrow, capacity)

    @classmethod
    def from_energy(
        cls,
        module: torch.nn.Module,
        cutoff: float | None = None,
        *,
        dtype: Any = None,
        engine: Engine = "auto",
        example: Any = None,
        second_derivatives: bool = False,
        parallel: bool = False,
        narrow: Literal["auto", False] = "auto",
        _script: Script | None = None,
        _verbose: bool | None = None,
        **options: Any,
    ) -> TorchMliap:
        """Wraps a module that returns energies only; torchcall differentiates them.

        The model has `position_gradients` and `cell_gradients`, by autograd. It uses a copy of the
        module in eval mode with constant weights: later changes of the module have no effect.

        Args:
            module: maps an `AtomGraphInput` of tensors to the energies (B,) in eV of all systems,
                phantoms included, alone or in a dict as `energy`. It must not detach them. Optional
                attributes: `cutoff`, in Å, and `species`, the atomic numbers that it knows;
                others are then errors in every engine.
            cutoff: in Å; None: the module's attribute.
            dtype: float32 or float64, for the weights and buffers of the copy. None: unchanged.
                Inputs are cast to the weights' dtype inside torch, outputs to that of the
                positions.
            engine: "eager" runs the module in Python. "script" compiles it with TorchScript.
                "auto" does so if it can, else runs it in Python; `stats()["fallback"]` has the
                reason. "package" compiles it with `torchcall.mliap.compile`, which takes up to some
                minutes, or loads it from the cache of packages. It reports its stages on stderr
                if that is a terminal, or with TORCHCALL_PROGRESS=1 in the environment;
                elsewhere (notebooks, batch jobs) nothing is printed until it returns.
            example: for "package" only: see `torchcall.mliap.compile`. None: a small structure;
                the package then serves any shapes, or compilation is an error.
            second_derivatives: for "package" only, see `torchcall.mliap.compile`; other engines
                have them always.
            parallel: for "package" only, see `torchcall.compile`.
            narrow: see the attributes.
            **options: options of `TorchModuleWrapper`, except `input_spec` and `output_spec`.

        Raises:
            TypeError, ValueError: an argument is wrong, the module has no cutoff, it cannot be
                scripted, or its output is not an energy for each system.
            CompileError: the module cannot be compiled.
        """
        refuse_specs("from_energy", options)
        _check_narrow("from_energy", narrow)
        source = energy_source(
            module,
            cutoff,
            dtype=dtype,
            engine=engine,
            example=example,
            script=_script,
            verbose=_verbose,
            second_derivatives=second_derivatives,
            parallel=parallel,
        )
        if isinstance(source.model, Path):
            return cls.from_package(source.model, narrow=narrow, **options)
        wrapper = wrapped(source.model, None, True, check=False, **options)
        wrapper._fallback = source.reason
        return cls(_one_cutoff(source.cutoff), wrapper, True, narrow)

    @classmethod
    def from_package(
        cls, path: str | Path, *, narrow: Literal["auto", False] = "auto", **options: Any
    ) -> TorchMliap:
        """Wraps a package made by `torchcall.mliap.compile`, which records its cutoff and dtypes.

        Args:
            path: the `.pt2` file.
            narrow: see the attributes; a package of static shapes is never narrowed.
            **options: options of `TorchModuleWrapper`, except `input_spec` and `output_spec`.

        Raises:
            FileNotFoundError, ValueError: the file is missing, damaged, or compiled for another
                torch, device or processor; or it was not made by `torchcall.mliap.compile`.
            TypeError: a spec is given.
        """
        package = read_potential(Path(path))
        refuse_specs("from_package", options)
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
        """Calls the module with this input, without adding or removing padding.

        Args:
            input: the graphs; all floats have one dtype.

        Returns:
            `energy` (B,), `position_gradients` (N, 3) and, if requested, `cell_gradients`
            (B, 3, 3), in the positions' dtype.

        Raises:
            TypeError, ValueError: a key is missing or a shape is wrong; the message names it.
            jax.errors.JaxRuntimeError: an error that is detected only during the call.
        """
        if not isinstance(self.wrapper, TorchModuleWrapper):  # another function of the input
            return self.checked(input, self.wrapper(input))
        error = unknown_element(self.species, input.get("atomic_numbers", ()), None, 0)
        if error:
            raise ValueError(f"torchcall: {self._name}: input['atomic_numbers']: {error}")
        return self.wrapper._call((input,), {}, call_options(self, input)[0])

    def evaluate(
        self,
        input: AtomGraphInput,
        n_atoms: Int[ArrayLike, ""],
        n_edges: Int[ArrayLike, ""],
        *,
        only_gradients: bool = False,
    ) -> dict[str, Array]:
        """`call` for a padded graph, without its unnecessary padded rows.

        With `narrow="auto"`, the module gets the valid rows and one phantom, at least two rows in
        total: the cost does not depend on capacities. Other rows of the result are zero. On a GPU,
        reading the lengths would synchronise with the host, so the module gets all rows; the same
        rows of the result are set to zero.

        Args:
            input: valid atoms and edges first, as returned by `pad_graph`.
            n_atoms, n_edges: numbers of valid atoms and edges.
            only_gradients: whether the energies are left out. JAX then knows that the Jacobian of
                the result is symmetric.

        Raises:
            TypeError, ValueError, jax.errors.JaxRuntimeError: as for `call`.
        """
        if not isinstance(self.wrapper, TorchModuleWrapper):
            return self.call(input)
        options, lengths = call_options(
            self, input, n_atoms, n_edges, only_gradients=only_gradients
        )
        out = self.wrapper._call((input,), {}, options, lengths)
        if lengths:
            out["position_gradients"] = zero_narrowed(out["position_gradients"], lengths[0])
        return out

    def warmup(self, graph: AtomGraph) -> None:
        """Calls the potential on a graph as `energy` does, and waits: `TorchModuleWrapper.warmup`.

        With `threads="auto"` this measures how many torch threads are best for graphs of these
        shapes. Call it after `allocate`, and again when the capacity of the list has changed. Calls
        under `jax.vmap` have other shapes.

        Args:
            graph: real data, not traced.

        Raises:
            TypeError: the graph is traced.
            ValueError: as for `energy`.
        """
        input, masks = self.padded(graph)
        self.check_cutoff(graph)
        self.check_species(graph)
        if not isinstance(self.wrapper, TorchModuleWrapper):
            jax.block_until_ready(self.call(input))
            return
        options, lengths = call_options(self, input, masks.n_atoms, masks.n_edges)
        self.wrapper._warm((input,), {}, options, lengths)

    def padded(self, graph: AtomGraph) -> tuple[AtomGraphInput, PaddingMasks]:
        """The graph as `energy` passes it to the module, with phantoms."""
        atoms, edges, systems = self.capacity or (None, None, None)
        # Phantom atoms need an element that the model declares, even if the graph has no atoms.
        element = (self.species or (1,))[0]
        return pad_with(
            graph, element, cutoff=self.cutoff, n_atoms=atoms, n_edges=edges, n_systems=systems
        )

    def output_specs(self, input: AtomGraphInput) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a potential's outputs, by key."""
        return output_specs(input, compute_cell_gradients=self.compute_cell_gradients)

    def checked(self, input: AtomGraphInput, out: Any) -> dict[str, Array]:
        """Checks keys and shapes of a potential's outputs, and casts to the positions' dtype."""
        specs = self.output_specs(input)
        check_outputs(self._name, out, {key: spec.shape for key, spec in specs.items()})
        return {key: out[key].astype(spec.dtype) for key, spec in specs.items()}

    @property
    def species(self) -> tuple[int, ...] | None:
        """The atomic numbers that the module declares, ascending; None if it declares none.

        Read once from the module's attribute or buffer `species` or `atomic_numbers`, or from the
        package's metadata. Another element is an error in every engine: before the call if the
        numbers are concrete, otherwise in the call. Traced numbers are checked on CPUs only: on a
        GPU, reading them would synchronise with the host.
        """
        return wrapped_species(self.wrapper)

    @property
    def _name(self) -> str:
        if isinstance(self.wrapper, TorchModuleWrapper):
            return self.wrapper._name
        return getattr(self.wrapper, "__name__", type(self.wrapper).__name__)

    @property
    def narrows(self) -> bool:
        """Whether calls of padded graphs leave out unnecessary rows."""
        fixed = self.narrow is False or self.capacity is not None
        return not fixed and isinstance(self.wrapper, TorchModuleWrapper)

    def check_species(self, graph: AtomGraph) -> None:
        """Checks that the module declares the elements, if the atomic numbers are concrete.

        Raises:
            ValueError: an element is not declared; the message names its first atom.
        """
        n_systems = graph.cell.shape[0]
        error = unknown_element(self.species, graph.atomic_numbers, graph.batch, n_systems)
        if error:
            raise ValueError(
                f"torchcall: {self._name}: graph.atomic_numbers: {error}; the model does not "
                "declare this element in its `species`"
            )

    def check_cutoff(self, graph: AtomGraph) -> None:
        """Compares the cutoff with that of the graph's neighbour list, if both are known.

        Raises:
            ValueError: they differ. A list with a shorter cutoff lacks pairs; one with a longer
                cutoff contains pairs that the model must not receive.
        """
        cutoff = self.cutoff.data
        if graph.list_cutoff is None or isinstance(cutoff, Tracer):
            return
        largest, listed = float(np.max(np.asarray(cutoff))), graph.list_cutoff
        if abs(largest - listed) <= 1e-6 * listed:
            return
        what = "lacks pairs" if listed < largest else "contains longer pairs"
        raise ValueError(
            f"torchcall: cutoff: expected a neighbour list with the model's cutoff {largest:g} Å, "
            f"got one with {listed:g} Å, which {what}"
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
