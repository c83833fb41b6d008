"""The fixed form of a potential's inputs and outputs, and its metadata."""

from collections.abc import Iterable
from typing import Any

import torch

from torchcall._compile import _metadata as _compile_metadata
from torchcall._compile._metadata import axis, dtype_name, row
from torchcall.mliap._package import KIND

N, E, B = "N", "E", "B"

INPUTS: dict[str, tuple[str | int, ...]] = {
    "pos": (N, 3),
    "atomic_numbers": (N,),
    "cell": (B, 3, 3),
    "pbc": (B, 3),
    "edge_index": (2, E),
    "cell_offsets": (E, 3),
    "batch": (N,),
    "charge": (B,),
    "spin": (B,),
}
"""Shapes by key, in the order of a package's flat inputs."""

OUTPUTS: dict[str, tuple[str | int, ...]] = {
    "energy": (B,),
    "position_gradients": (N, 3),
    "cell_gradients": (B, 3, 3),
}
"""Shapes by key, in the order of a package's outputs; without cell gradients, the first two."""

MINIMUM = {N: 2, E: 2, B: 2}
"""Minimum length of each axis: required by exported programs, guaranteed by `pad_graph`."""

Sizes = dict[str, int]
"""Numbers of atoms, edges and systems, by `N`, `E` and `B`."""

Graph = dict[str, torch.Tensor]
"""An `AtomGraphInput` of tensors, in the order of `INPUTS`."""


def sizes_of(graph: Graph) -> Sizes:
    """The lengths of the three axes."""
    atoms, edges, systems = graph["pos"], graph["cell_offsets"], graph["cell"]
    return {N: atoms.shape[0], E: edges.shape[0], B: systems.shape[0]}


def shape_of(form: tuple[str | int, ...], sizes: Sizes) -> tuple[int, ...]:
    """The shape with the names of axes replaced by their sizes."""
    return tuple(sizes[n] if isinstance(n, str) else n for n in form)


def dtype_of(key: str, floats: torch.dtype) -> torch.dtype:
    """The dtype of an input; `floats` is the positions' dtype."""
    if key in ("atomic_numbers", "edge_index", "batch"):
        return torch.int64
    return torch.bool if key == "pbc" else floats


def metadata_of(
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    cutoff: float,
    species: Iterable[int] | None,
    cell_gradients: bool,
    capacity: Sizes | None,
    content: str,
) -> dict[str, Any]:
    """The metadata of a potential's package.

    It states the checks of a call: entries of `edge_index` are rows of `pos`, entries of `batch`
    are rows of `cell`, and atomic numbers are members of `species`. `TorchMliap.from_package`
    reads the key `user`.
    """
    known = None if species is None else sorted(species)
    checks: dict[str, dict[str, Any]] = {
        "edge_index": {"rows_of": "pos"},
        "batch": {"rows_of": "cell"},
    }
    if known and known[-1] < 128:
        checks["atomic_numbers"] = {"members": known}
    keys = list(OUTPUTS) if cell_gradients else list(OUTPUTS)[:2]
    return _compile_metadata.metadata_of(
        name=name,
        device=device,
        content=content,
        inputs=[
            row(key, dtype_of(key, dtype), list(form), **checks.get(key, {}))
            for key, form in INPUTS.items()
        ],
        outputs=[row(key, dtype, list(OUTPUTS[key])) for key in keys],
        axes={
            name: axis(least, capacity=None if capacity is None else capacity[name])
            for name, least in MINIMUM.items()
        },
        user={
            "kind": KIND,
            "dtype": dtype_name(dtype),
            "cutoff": cutoff,
            "species": known,
            "compute_cell_gradients": cell_gradients,
        },
    )
