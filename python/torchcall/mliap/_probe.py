"""Checks of a potential when it is wrapped: a trace with fake tensors, which runs no kernel.

Fake tensors have shapes and dtypes, but no values. Modules that fake tensors cannot trace (their
shapes or branches depend on values) are not checked here: their first call is.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from torchcall._call.call import CallOptions
from torchcall._call.planning import describe_call
from torchcall._call.specs import torch_dtype_name
from torchcall._compile._copy import inference_copy
from torchcall._engines.fakes import InferenceError, infer_outputs
from torchcall._engines.package import PackageSource
from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap._energy_torch import weights_dtype
from torchcall.mliap._input import AtomGraphInput, input_dtypes, output_specs
from torchcall.mliap._outputs import (
    Followed,
    WithoutGraph,
    check_attached,
    check_outputs,
    checked_energy,
)

# (atoms, edges, systems): different from each other and from the sizes of other axes.
_SIZES = (7, 13, 5)

# Errors of a forward that does not take a dict as its one argument, whatever the values.
_OTHER_INPUT = re.compile(
    r"missing \d+ required positional argument"
    r"|takes \d+ positional arguments? but|expected at most \d+ argument"
    r"|must be Tensor, not dict|invalid combination of arguments - got \(dict\b"
    r"|'dict' object has no attribute"
    r"|Expected a value of type 'Tensor.*' for argument '\w+' but instead found type '?[Dd]ict"
    r"|\(from the model's signature\)"
)

# Per wrapper: the values of `compute_cell_gradients` that were checked.
_checked: weakref.WeakKeyDictionary[TorchModuleWrapper, set[bool]] = weakref.WeakKeyDictionary()


def check_wrapper(
    wrapper: TorchModuleWrapper,
    compute_cell_gradients: bool,
    capacity: tuple[int, int, int] | None,
    dtype: torch.dtype | None = None,
) -> str:
    """Checks once what a wrapped module returns.

    Args:
        wrapper: the module.
        compute_cell_gradients: whether it must return `cell_gradients`.
        capacity: the sizes that it is made for; None: any.
        dtype: the positions'; None: JAX's default.

    Returns:
        Why the module could not be traced, empty if it could.

    Raises:
        TypeError, ValueError: the outputs or the use of the input are wrong.
    """
    done = _checked.setdefault(wrapper, set())
    if compute_cell_gradients in done or wrapper._source.engine == "AOTInductor":
        return ""
    graph: Any = _input(dtype, capacity or _SIZES, np.int32)
    try:
        out = wrapper._infer(graph)
    except (InferenceError, TypeError, ValueError) as error:
        _raise_if_certain(wrapper._name, error)
        done.add(compute_cell_gradients)
        return str(error)
    specs = output_specs(graph, compute_cell_gradients=compute_cell_gradients)
    check_outputs(wrapper._name, out, {key: spec.shape for key, spec in specs.items()})
    done.add(compute_cell_gradients)
    return ""


def wrapped(
    module: Any,
    capacity: tuple[int, int, int] | None,
    compute_cell_gradients: bool,
    *,
    check: bool,
    **options: Any,
) -> TorchModuleWrapper:
    """Wraps a module and checks it. Its inputs are cast to the weights' dtype if it takes no other.

    Args:
        module: anything that `TorchModuleWrapper` takes.
        capacity, compute_cell_gradients: see `check_wrapper`.
        check: False for a module that needs no check.
        **options: those of `TorchModuleWrapper`.
    """
    casts = input_dtypes()
    options = {"requires_grad": True, **options}
    wrapper = TorchModuleWrapper(module, input_spec=((casts,), {}), **options)
    if not check:
        _checked[wrapper] = {True, False}
        return wrapper
    own = weights_dtype(wrapper._inspected()) if wrapper._source.engine != "AOTInductor" else None
    # JAX's positions may have either dtype, so try the one that the weights do not have.
    other = {torch.float32: torch.float64, torch.float64: torch.float32}.get(own)  # pyright: ignore
    if not check_wrapper(wrapper, compute_cell_gradients, capacity, other) or own is None:
        return wrapper
    casts |= dict.fromkeys(("pos", "cell", "cell_offsets", "charge", "spin"), own)
    cast = TorchModuleWrapper(module, input_spec=((casts,), {}), **options)
    failed = check_wrapper(cast, compute_cell_gradients, capacity, other)
    return wrapper if failed else cast


def check_energy(module: torch.nn.Module, name: str) -> None:
    """Checks what a module returns that computes energies only.

    Args:
        module: an eager module.
        name: what errors call it.

    Raises:
        TypeError, ValueError: the outputs, the use of the input or the dtypes are wrong.
    """
    dtype = weights_dtype(module)
    reason = _energy_failure(_cpu_copy(module), name, dtype)
    weights = [*module.parameters(), *module.buffers()] if reason else []
    found = {weight.dtype for weight in weights if weight.is_floating_point()}
    for cast in (torch.float32, torch.float64) if found else ():
        if found == {cast} or _energy_failure(_cpu_copy(module).to(dtype=cast), name, cast):
            continue
        names = ", ".join(sorted(map(torch_dtype_name, found)))
        raise TypeError(
            f"torchcall: {name}: expected weights and buffers that fit each other and the input, "
            f"got {names}; dtype='{torch_dtype_name(cast)}' casts them\n{reason}"
        )


def no_second_derivatives(wrapper: TorchModuleWrapper, compute_cell_gradients: bool) -> str:
    """Why the gradients that a module returns have no derivatives; empty if they may have some.

    Cell gradients count only where they are used. Modules that fake tensors cannot trace fail in
    their first call, if at all.
    """
    source = wrapper._source
    if isinstance(source, PackageSource):
        own = source.metadata.torchcall
        if own is None or own.get("gradients"):
            return ""
        return (
            "expected a package that has them, got one without; compile it again with "
            "torchcall.mliap.compile(..., second_derivatives=True), or use the module itself: "
            'engine="script" or "eager" of TorchMliap.from_energy or torchcall.models.load'
        )

    used = ["position_gradients", *(["cell_gradients"] if compute_cell_gradients else [])]

    def probed(module: Any) -> Any:
        def forward(graph: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            leaves = {key: graph[key].requires_grad_(True) for key in ("pos", "cell")}
            given = {key: leaf.clone() for key, leaf in leaves.items()}
            with WithoutGraph(*given.values()) as followed:
                out = module(graph | given)
            for key in used:
                if key not in out:
                    continue
                # One that is detached in part would have derivatives that are wrong.
                if followed.is_cut(out[key]) or not _depends(out[key], list(leaves.values())):
                    raise _Detached(key)
            return out

        return forward

    specs, structure = jax.tree.flatten(((_input(None, _SIZES, np.int32),), {}))
    options = wrapper._options | {"requires_grad": True}
    call = describe_call(structure, specs, options, CallOptions())
    try:
        wrapper._source.prepare_call(wrapper._model, call).infer_outputs(probed)
    except (InferenceError, TypeError, ValueError) as error:
        if isinstance(error.__cause__, _Detached):
            return (
                f"expected a module whose output [{str(error.__cause__)!r}] autograd can "
                "differentiate, got one that is detached, or a part of it; pass create_graph=True "
                "to torch.autograd.grad there and do not detach, or return the energy alone "
                "(TorchMliap.from_energy); or use finite differences"
            )
    return ""


def _depends(output: torch.Tensor, leaves: list[torch.Tensor]) -> bool:
    if not output.requires_grad:
        return False
    found = torch.autograd.grad(output.sum(), leaves, allow_unused=True, retain_graph=True)
    return any(gradient is not None for gradient in found)


class _Detached(Exception):
    """The key of an output that has no derivatives."""


def _cpu_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy for tracing, which may set attributes to fake tensors; these are on the CPU."""
    return inference_copy(module).cpu()


def _energy_failure(module: torch.nn.Module, name: str, dtype: torch.dtype | None) -> str:
    """Why a module cannot be traced, empty if it can. Raises for wrong outputs."""
    n_atoms, _, n_systems = _SIZES

    def forward(graph: dict[str, torch.Tensor]) -> torch.Tensor:
        leaves = {key: graph[key].requires_grad_(True) for key in ("pos", "cell")}
        graph = graph | {key: leaf.clone() for key, leaf in leaves.items()}
        with Followed(graph["pos"], graph["cell"]) as followed:
            out = module(graph)
        if isinstance(out, Mapping) and "position_gradients" in out:
            raise TypeError(
                f"torchcall: {name}: output: expected energies only, got 'position_gradients' too; "
                "use TorchMliap.from_module"
            )
        energy = checked_energy(name, out, n_atoms=n_atoms, n_systems=n_systems)
        check_attached(name, energy, followed)
        return energy

    graph = _input(dtype, _SIZES, np.int64)
    try:
        infer_outputs(lambda: forward, (graph,), {}, requires_grad=True)
    except InferenceError as error:
        _raise_if_certain(name, error)
        return str(error)
    return ""


def _raise_if_certain(name: str, error: Exception) -> None:
    """Raises if the module is at fault, not the trace."""
    cause = error.__cause__ if isinstance(error, InferenceError) else None
    text = str(cause or "")
    if isinstance(cause, TypeError | ValueError) and text.startswith("torchcall: "):
        raise cause from None
    if "requires_grad=True, got requires_grad=False" in str(error):
        raise ValueError(
            f"torchcall: {name}: expected requires_grad=True, got requires_grad=False: the module "
            "differentiates inside its forward"
        ) from error
    if isinstance(error, InferenceError) and cause is None:  # an output that is not a tensor
        raise TypeError(f"torchcall: {name}: {error}") from error
    if isinstance(cause, KeyError) and cause.args and isinstance(cause.args[0], str):
        keys = AtomGraphInput.__annotations__
        if cause.args[0] not in keys:
            raise ValueError(
                f"torchcall: {name}: input: expected a module that reads the keys of an "
                f"AtomGraphInput, {', '.join(keys)}; got one that reads {cause.args[0]!r}"
            ) from cause
    if not isinstance(error, InferenceError):
        text = str(error)
    if found := [line.strip() for line in text.splitlines() if _OTHER_INPUT.search(line)]:
        raise TypeError(
            f"torchcall: {name}: input: expected a module whose forward takes one AtomGraphInput, "
            f"a dict of tensors, got one that takes something else: {found[0]}"
        ) from error


def _input(
    dtype: torch.dtype | None, sizes: tuple[int, int, int], integer: type[np.integer]
) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes and dtypes of an `AtomGraphInput`."""
    n, e, b = sizes
    floats = np.dtype(
        torch_dtype_name(dtype) if dtype else jax.dtypes.canonicalize_dtype(np.float64)
    )
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "pos": ((n, 3), floats),
        "atomic_numbers": ((n,), integer),
        "cell": ((b, 3, 3), floats),
        "pbc": ((b, 3), np.bool_),
        "edge_index": ((2, e), integer),
        "cell_offsets": ((e, 3), floats),
        "batch": ((n,), integer),
        "charge": ((b,), floats),
        "spin": ((b,), floats),
    }
    with jax.enable_x64(True):  # otherwise 64-bit dtypes would become 32-bit ones
        return {key: jax.ShapeDtypeStruct(*shape) for key, shape in shapes.items()}


def refuse_specs(method: str, options: dict[str, Any]) -> None:
    """Raises TypeError if the options contain a spec, which is fixed for potentials."""
    for name in ("input_spec", "output_spec"):
        if name in options:
            raise TypeError(
                f"torchcall: TorchMliap.{method}: {name} is fixed for potentials; to set it, "
                "make a TorchModuleWrapper and pass it to TorchMliap(cutoff, wrapper)"
            )
