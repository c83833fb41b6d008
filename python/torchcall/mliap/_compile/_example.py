"""The example for tracing, as tensors in the form of a package's input."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from torchcall._compile._metadata import dtype_name
from torchcall.mliap._compile._form import INPUTS, MINIMUM, Graph, dtype_of, shape_of
from torchcall.mliap._graph import AtomGraph
from torchcall.mliap._padding import pad_graph

_FLOATS = {"float32": torch.float32, "float64": torch.float64}


def checked_cutoff(cutoff: Any, where: str = "torchcall: compile") -> float:
    """The cutoff as a number.

    Args:
        cutoff: what the user passed.
        where: the beginning of an error.

    Raises:
        ValueError: it is not a positive length.
    """
    try:
        value = float(cutoff)
    except (TypeError, ValueError) as error:
        raise _cutoff_error(cutoff, where) from error
    if isinstance(cutoff, bool | str) or not 0 < value < math.inf:
        raise _cutoff_error(cutoff, where)
    return value


def _cutoff_error(got: object, where: str) -> ValueError:
    return ValueError(f"{where}: cutoff: expected a positive length in Å, got {got!r}")


def checked_dtype(dtype: Any, where: str = "torchcall: compile") -> torch.dtype | None:
    """The torch dtype for float32 or float64 of torch, NumPy or JAX, or a name; None for None.

    Args:
        dtype: what the user passed.
        where: the beginning of an error.

    Raises:
        TypeError: the argument is neither.
    """
    if dtype is None:
        return None
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else _numpy_name(dtype)
    if name not in _FLOATS:
        raise TypeError(f"{where}: dtype: expected float32 or float64, got {dtype!r}")
    return _FLOATS[name]


def _numpy_name(dtype: Any) -> str:
    try:
        return np.dtype(dtype).name
    except (TypeError, ValueError, AttributeError):
        return ""


def example_tensors(
    example: Any, *, cutoff: float, dtype: torch.dtype | None, device: torch.device
) -> Graph:
    """The example as an `AtomGraphInput` of tensors, checked.

    Args:
        example: an `AtomGraph`, which is padded to the smallest sizes, or an `AtomGraphInput` of
            arrays of any library, which is not padded.
        cutoff: in Å; sets the size of the phantom system of an `AtomGraph`.
        dtype: dtype of the floats; that of the positions if None.
        device: device of the tensors.

    Raises:
        TypeError: the example has another type, or an array has a wrong dtype.
        ValueError: a key is missing, or a shape or a value is wrong; the message names it.
    """
    if isinstance(example, AtomGraph):
        arrays = _padded(example, cutoff)
    elif isinstance(example, Mapping):
        arrays = dict(example)
    else:
        raise TypeError(
            "torchcall: compile: example: expected a torchcall.mliap.AtomGraph or an "
            f"AtomGraphInput (a dict), got {type(example).__name__}"
        )
    missing = [key for key in INPUTS if key not in arrays]
    if missing:
        raise ValueError(
            f"torchcall: compile: example: expected an AtomGraphInput, got one without "
            f"{', '.join(map(repr, missing))}"
        )
    tensors = {key: _tensor(key, arrays[key]) for key in INPUTS}
    if dtype is None:
        dtype = checked_positions(tensors["pos"])
    _check_kinds(tensors)
    tensors = {
        key: tensor.to(torch.int64) if dtype_of(key, dtype) == torch.int64 else tensor
        for key, tensor in tensors.items()
    }
    _check_shapes(tensors)
    _check_values(tensors)
    return {key: t.to(device, dtype_of(key, dtype)).contiguous() for key, t in tensors.items()}


def checked_positions(pos: torch.Tensor) -> torch.dtype:
    """The positions' dtype.

    Raises:
        TypeError: the dtype is neither float32 nor float64.
    """
    if pos.dtype not in _FLOATS.values():
        raise TypeError(
            "torchcall: compile: example['pos']: expected float32 or float64, "
            f"got {dtype_name(pos.dtype)}"
        )
    return pos.dtype


def _padded(graph: AtomGraph, cutoff: float) -> dict[str, Any]:
    listed = graph.list_cutoff
    if listed is not None and abs(cutoff - listed) > 1e-6 * listed:
        raise ValueError(
            f"torchcall: compile: cutoff: expected that of the example's neighbour list, "
            f"{listed:g} Å, got {cutoff:g} Å"
        )
    # Retain float64 arrays even if jax_enable_x64 is off outside.
    with jax.enable_x64(True):
        return dict(pad_graph(graph, cutoff=cutoff)[0])


def _tensor(key: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Tracer):
        raise TypeError(
            f"torchcall: compile: example[{key!r}]: expected a concrete array, got a traced one; "
            "compile outside jit"
        )
    try:
        array = np.array(value)
        return torch.from_numpy(array if array.dtype.kind in "biuf" else np.empty(array.shape, "O"))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"torchcall: compile: example[{key!r}]: expected an array of numbers, "
            f"got {type(value).__name__}"
        ) from error


def _check_kinds(tensors: Graph) -> None:
    for key, tensor in tensors.items():
        wanted = dtype_of(key, torch.float64)
        floating, boolean = tensor.dtype.is_floating_point, tensor.dtype == torch.bool
        if wanted == torch.int64 and (floating or boolean):
            expected = "integers"
        elif wanted == torch.bool and not boolean:
            expected = "bool"
        elif wanted == torch.float64 and boolean:
            expected = "numbers"
        else:
            continue
        raise TypeError(
            f"torchcall: compile: example[{key!r}]: expected {expected}, "
            f"got {dtype_name(tensor.dtype)}"
        )


def _check_shapes(tensors: Graph) -> None:
    sizes = {
        name: tensors[key].shape[axis] if tensors[key].ndim > axis else 0
        for name, key, axis in (("N", "pos", 0), ("E", "edge_index", 1), ("B", "cell", 0))
    }
    for key, form in INPUTS.items():
        found, expected = tuple(tensors[key].shape), shape_of(form, sizes)
        if found != expected:
            raise ValueError(
                f"torchcall: compile: example[{key!r}]: expected shape {expected}, got {found}"
            )
    for name, key, what in (("N", "pos", "atoms"), ("E", "edge_index", "edges")):
        if sizes[name] < MINIMUM[name]:
            raise ValueError(_too_short(key, what, sizes[name]))
    if sizes["B"] < MINIMUM["B"]:
        raise ValueError(_too_short("cell", "systems", sizes["B"]))


def _too_short(key: str, what: str, got: int) -> str:
    return (
        f"torchcall: compile: example[{key!r}]: expected at least 2 {what}, phantoms included, got "
        f"{got}; pass an AtomGraph, or the result of pad_graph"
    )


def _check_values(tensors: Graph) -> None:
    n_atoms, n_systems = tensors["pos"].shape[0], tensors["cell"].shape[0]
    batch, offsets, index = tensors["batch"], tensors["cell_offsets"], tensors["edge_index"]
    for key in ("pos", "cell", "cell_offsets", "charge", "spin"):
        if not bool(torch.isfinite(tensors[key]).all()):
            raise ValueError(_value_text(key, "finite numbers", "NaN or infinity"))
    for key, end in (("edge_index", n_atoms), ("batch", n_systems)):
        low, high = int(tensors[key].min()), int(tensors[key].max())
        if low < 0 or high >= end:
            raise ValueError(
                _value_text(key, f"numbers in [0, {end})", f"{low if low < 0 else high}")
            )
    if bool((batch[1:] < batch[:-1]).any()):
        raise ValueError(_value_text("batch", "nondecreasing systems", "decreasing ones"))
    if bool((offsets != offsets.round()).any()):
        raise ValueError(_value_text("cell_offsets", "whole numbers", "fractions"))
    if int(tensors["atomic_numbers"].min()) < 1:
        got = str(int(tensors["atomic_numbers"].min()))
        raise ValueError(_value_text("atomic_numbers", "numbers from 1 on", got))
    itself = (index[0] == index[1]) & (offsets == 0).all(1)
    if bool(itself.any()):
        edge = int(itself.nonzero()[0])
        expected = "edges between different atoms or images"
        raise ValueError(_value_text("edge_index", expected, f"edge {edge} of an atom to itself"))


def _value_text(key: str, expected: str, got: str) -> str:
    return f"torchcall: compile: example[{key!r}]: expected {expected}, got {got}"
