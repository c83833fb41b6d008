"""The fixed form of a potential's inputs and outputs, and the metadata that state it."""

from typing import Any

import torch

from torchcall._engines.package_file import FORMAT

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
"""Likewise; without cell gradients, the first two."""

MINIMUM = {N: 2, E: 2, B: 2}
"""Of every axis: what exported programs can serve, and what `pad_graph` guarantees."""

Sizes = dict[str, int]
"""Numbers of atoms, edges and systems, by `N`, `E` and `B`."""

Graph = dict[str, torch.Tensor]
"""An `AtomGraphInput` of tensors, in the order of `INPUTS`."""


def sizes_of(graph: Graph) -> Sizes:
    """The lengths of the three axes."""
    atoms, edges, systems = graph["pos"], graph["cell_offsets"], graph["cell"]
    return {N: atoms.shape[0], E: edges.shape[0], B: systems.shape[0]}


def shape_of(form: tuple[str | int, ...], sizes: Sizes) -> tuple[int, ...]:
    """A shape with numbers in place of names."""
    return tuple(sizes[n] if isinstance(n, str) else n for n in form)


def dtype_of(key: str, floats: torch.dtype) -> torch.dtype:
    """What an input has to be, `floats` being the positions' dtype."""
    if key in ("atomic_numbers", "edge_index", "batch"):
        return torch.int64
    return torch.bool if key == "pbc" else floats


def dtype_name(dtype: torch.dtype) -> str:
    """NumPy's name: float32 for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def metadata_of(
    *,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    cutoff: float,
    species: list[int] | None,
    cell_gradients: bool,
    capacity: Sizes | None,
    content: str,
) -> dict[str, Any]:
    """What a package says about itself, to be read by `_engines.package_file`."""
    outputs = list(OUTPUTS) if cell_gradients else list(OUTPUTS)[:2]
    return {
        "format": FORMAT,
        "kind": "mliap",
        "name": name,
        "torch": torch.__version__,
        "device": device.type,
        "dtype": dtype_name(dtype),
        "cutoff": cutoff,
        "species": species,
        "compute_cell_gradients": cell_gradients,
        "inputs": [
            [key, dtype_name(dtype_of(key, dtype)), list(form)] for key, form in INPUTS.items()
        ],
        "outputs": [[key, dtype_name(dtype), list(OUTPUTS[key])] for key in outputs],
        "capacity": capacity,
        "minimum": MINIMUM,
        "content": content,
    }
