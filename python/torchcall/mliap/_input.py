"""Input of a machine-learned potential, `AtomGraphInput`, and the form of its outputs."""

from typing import TypedDict

import jax
import torch
from jaxtyping import Array, Bool, Float, Int

from torchcall._call.narrowing import Axis, Narrowing


class AtomGraphInput(TypedDict):
    """A batch of atom graphs: N atoms, B systems, E edges, phantoms included.

    Edge e points from atom `i = edge_index[0, e]` (sender) to `j = edge_index[1, e]` (receiver),
    along `r = pos[j] − pos[i] + cell_offsets[e] @ cell[batch[i]]`, `|r| < cutoff`. The edges form a
    full directed list without `(i, i, 0)`; r is zero where atoms coincide. Rows of `cell` are
    lattice vectors.
    """

    pos: Float[Array, "N 3"]
    """Å, wrapped or not."""
    atomic_numbers: Int[Array, " N"]
    """int64 in torch."""
    cell: Float[Array, "B 3 3"]
    """Å; rows are lattice vectors."""
    pbc: Bool[Array, "B 3"]
    """Periodicity along each lattice vector."""
    edge_index: Int[Array, "2 E"]
    """Senders and receivers; int64 in torch."""
    cell_offsets: Float[Array, "E 3"]
    """Integer-valued, in the positions' dtype."""
    batch: Int[Array, " N"]
    """System of each atom, nondecreasing; int64 in torch."""
    charge: Float[Array, " B"]
    """Total charge of each system, in e."""
    spin: Float[Array, " B"]
    """Spin of each system, in the convention of the model."""


def input_dtypes() -> dict[str, torch.dtype | None]:
    """The torch dtype that each key of an `AtomGraphInput` is cast to; None means no cast.

    Models expect int64 indices, which JAX without x64 does not have. For a
    `torchcall.TorchModuleWrapper` whose only argument is an `AtomGraphInput`, pass
    `input_spec=((input_dtypes(),), {})`.
    """
    index = {"atomic_numbers", "edge_index", "batch"}
    return {key: torch.int64 if key in index else None for key in AtomGraphInput.__annotations__}


def output_specs(
    graph: AtomGraphInput, *, compute_cell_gradients: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of the outputs of a `TorchMliapForward` module for `graph`."""
    n_atoms, n_systems, dtype = graph["pos"].shape[0], graph["cell"].shape[0], graph["pos"].dtype
    specs = {
        "energy": jax.ShapeDtypeStruct((n_systems,), dtype),
        "position_gradients": jax.ShapeDtypeStruct((n_atoms, 3), dtype),
    }
    if compute_cell_gradients:
        specs["cell_gradients"] = jax.ShapeDtypeStruct((n_systems, 3, 3), dtype)
    return specs


def narrowing(outputs: tuple[str, ...]) -> Narrowing:
    """The padded axes of a graph and of the outputs with these keys."""
    atoms, edges = Axis(0, 0), Axis(1, 0)
    inputs = {
        "pos": atoms,
        "atomic_numbers": atoms,
        "batch": atoms,
        "edge_index": Axis(1, 1),
        "cell_offsets": edges,
    }
    of_atoms = {"position_gradients", "position_gradients_deviation"}
    return Narrowing(
        names=("n_atoms", "n_edges"),
        # In the order of the leaves of a dict.
        inputs=tuple(inputs.get(key) for key in sorted(AtomGraphInput.__annotations__)),
        outputs={key: atoms if key in of_atoms else None for key in outputs},
    )
