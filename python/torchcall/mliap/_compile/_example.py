"""The example that a module is traced with, as tensors in the form that packages take."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch
from jax.core import Tracer

from torchcall._compile._metadata import dtype_name
from torchcall.mliap import AtomGraph, pad_graph
from torchcall.mliap._compile._form import INPUTS, MINIMUM, Graph, dtype_of, shape_of

_FLOATS = {"float32": torch.float32, "float64": torch.float64}


def checked_cutoff(cutoff: Any) -> float:
    """The cutoff as a number.

    Raises:
        ValueError: it is no positive length.
    """
    try:
        value = float(cutoff)
    except (TypeError, ValueError) as error:
        raise ValueError(_cutoff(repr(cutoff))) from error
    if isinstance(cutoff, bool | str) or not 0 < value < math.inf:
        raise ValueError(_cutoff(repr(cutoff)))
    return value


def _cutoff(got: str) -> str:
    return f"torchcall: compile: cutoff: expected a positive length in Å, got {got}"


def checked_dtype(dtype: Any) -> torch.dtype | None:
    """float32 or float64 of torch, NumPy or JAX, or its name; None stays.

    Raises:
        TypeError: it is another dtype, or none.
    """
    if dtype is None:
        return None
    name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else _numpy_name(dtype)
    if name not in _FLOATS:
        raise TypeError(f"torchcall: compile: dtype: expected float32 or float64, got {dtype!r}")
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
        example: an `AtomGraph`, which is padded as little as possible, or an `AtomGraphInput` of
            arrays of any library, taken as it is.
        cutoff: in Å; sizes the phantom system of an `AtomGraph`.
        dtype: of the floats; None: that of the positions.
        device: where the tensors go.

    Raises:
        TypeError: it is something else, or a dtype does not fit.
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
            f"torchcall: compile: example: expected the keys of an AtomGraphInput, got none for "
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
        TypeError: it is neither float32 nor float64.
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
    # Doubles stay doubles whatever JAX is set to outside.
    with jax.enable_x64(True):
        return dict(pad_graph(graph, cutoff=cutoff)[0])


def _tensor(key: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Tracer):
        raise TypeError(
            f"torchcall: compile: example[{key!r}]: expected an array with values, got one that is "
            "traced; compile outside jit"
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
        f"{got}; pass an AtomGraph, or what pad_graph returns"
    )


def _check_values(tensors: Graph) -> None:
    n_atoms, n_systems = tensors["pos"].shape[0], tensors["cell"].shape[0]
    batch, offsets, index = tensors["batch"], tensors["cell_offsets"], tensors["edge_index"]
    for key in ("pos", "cell", "cell_offsets", "charge", "spin"):
        if not bool(torch.isfinite(tensors[key]).all()):
            raise ValueError(_value(key, "finite numbers", "NaN or infinity"))
    for key, end in (("edge_index", n_atoms), ("batch", n_systems)):
        low, high = int(tensors[key].min()), int(tensors[key].max())
        if low < 0 or high >= end:
            raise ValueError(_value(key, f"numbers in [0, {end})", f"{low if low < 0 else high}"))
    if bool((batch[1:] < batch[:-1]).any()):
        raise ValueError(_value("batch", "systems that never decrease", "unordered ones"))
    if bool((offsets != offsets.round()).any()):
        raise ValueError(_value("cell_offsets", "whole numbers", "fractions"))
    if int(tensors["atomic_numbers"].min()) < 1:
        got = str(int(tensors["atomic_numbers"].min()))
        raise ValueError(_value("atomic_numbers", "numbers from 1 on", got))
    itself = (index[0] == index[1]) & (offsets == 0).all(1)
    if bool(itself.any()):
        edge = int(itself.nonzero()[0])
        expected = "edges between different atoms or images"
        raise ValueError(_value("edge_index", expected, f"edge {edge} of an atom to itself"))


def _value(key: str, expected: str, got: str) -> str:
    return f"torchcall: compile: example[{key!r}]: expected {expected}, got {got}"
