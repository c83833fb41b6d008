"""The part of a package's metadata that describes a potential."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from torchcall._engines.package import PackageSource

KIND = "mliap"
_AXES = ("N", "E", "B")
_KEYS: dict[str, tuple[type, ...]] = {
    "dtype": (str,),
    "cutoff": (int, float),
    "species": (list, type(None)),
    "compute_cell_gradients": (bool,),
}


class PotentialPackage(NamedTuple):
    """A package of a potential.

    Attributes:
        source: the file.
        cutoff: in Å.
        compute_cell_gradients: whether `cell_gradients` are among the outputs.
        capacity: (atoms, edges, systems), phantoms included, of a package for fixed shapes.
        dtypes: dtype of each input, by key.
    """

    source: PackageSource
    cutoff: float
    compute_cell_gradients: bool
    capacity: tuple[int, int, int] | None
    dtypes: dict[str, str]


def read_potential(path: Path) -> PotentialPackage:
    """Reads a package that `torchcall.mliap.compile` made.

    Raises:
        FileNotFoundError, ValueError: the file is missing or damaged, it is for another torch,
            device or processor, or it does not contain a potential.
    """
    source = PackageSource(path)
    own = source.metadata.torchcall
    user = {} if own is None else own["user"]
    if own is None or user.get("kind") != KIND:
        raise ValueError(
            f"torchcall: {path}: expected a package made by torchcall.mliap.compile, got another "
            "package, which does not record its cutoff; wrap it with "
            "TorchMliap(cutoff, torchcall.load(path, input_spec=...))"
        )
    for key, types in _KEYS.items():
        value = user.get(key)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _refusal(path, key, value)
    if not 0 < user["cutoff"] < math.inf:
        raise _refusal(path, "cutoff", user["cutoff"])
    if not all(type(number) is int and number > 0 for number in user["species"] or []):
        raise _refusal(path, "species", user["species"])
    if set(own["axes"]) != set(_AXES):
        raise _refusal(path, "axes", own["axes"])
    sizes = [own["axes"][name]["capacity"] for name in _AXES]
    capacity: Any = None if sizes == [None] * 3 else tuple(sizes)
    if capacity is not None and None in capacity:
        raise _refusal(path, "axes", own["axes"])
    return PotentialPackage(
        source,
        float(user["cutoff"]),
        user["compute_cell_gradients"],
        capacity,
        {row["name"]: row["dtype"] for row in own["inputs"]},
    )


def _refusal(path: Path, key: str, value: object) -> ValueError:
    return ValueError(
        f"torchcall: {path}: expected the metadata of a potential, got {key!r}: {value!r}; compile "
        "the model again"
    )
