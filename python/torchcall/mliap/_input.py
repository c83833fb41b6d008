"""What a machine-learned potential receives: the `AtomGraphInput`, its dtypes, its padding."""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Bool, Float, Int


class AtomGraphInput(TypedDict):
    """A batch of atom graphs: N atoms, B systems, E edges, phantoms included.

    Edge e points from atom `i = edge_index[0, e]` (sender) to `j = edge_index[1, e]` (receiver),
    along `r = pos[j] − pos[i] + cell_offsets[e] @ cell[batch[i]]`, `0 < |r| < cutoff`. The edges
    form a full directed list. Rows of `cell` are lattice vectors.
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
    """Spin of each system, as its model counts it."""


def input_dtypes() -> dict[str, torch.dtype | None]:
    """The torch dtype that each key of an `AtomGraphInput` is cast to; None leaves it as it is.

    JAX without x64 cannot hold the int64 indices that models want. Serves as the `input_spec` of a
    `torchcall.TorchModuleWrapper` whose only argument is an `AtomGraphInput`:
    `input_spec=((input_dtypes(),), {})`.
    """
    index = {"atomic_numbers", "edge_index", "batch"}
    return {key: torch.int64 if key in index else None for key in AtomGraphInput.__annotations__}


def output_specs(
    graph: AtomGraphInput, *, compute_cell_gradients: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what a module that obeys `TorchMliapForward` returns for `graph`."""
    n_atoms, n_systems, dtype = graph["pos"].shape[0], graph["cell"].shape[0], graph["pos"].dtype
    specs = {
        "energy": jax.ShapeDtypeStruct((n_systems,), dtype),
        "position_gradients": jax.ShapeDtypeStruct((n_atoms, 3), dtype),
    }
    if compute_cell_gradients:
        specs["cell_gradients"] = jax.ShapeDtypeStruct((n_systems, 3, 3), dtype)
    return specs


def with_phantoms(
    positions: Float[Array, "n 3"],
    atomic_numbers: Int[Array, " n"],
    cell: Float[Array, "b 3 3"] | Float[Array, "3 3"],
    pbc: Bool[Array, "b 3"] | Bool[Array, " 3"],
    edge_index: Int[Array, "2 E"],
    cell_offsets: Any,
    *,
    cutoff: float,
    batch: Int[Array, " n"] | None = None,
    charge: Float[Array, " b"] | None = None,
    spin: Float[Array, " b"] | None = None,
) -> AtomGraphInput:
    """Appends one phantom atom and one phantom system to atoms whose edge slots are already padded.

    The phantom atom `p = n` sits at the origin of a periodic cube of side `2 × cutoff`, with the
    atomic number of the first atom (1 if there is none). Unused edge slots are expected to be `(p,
    p)` with offset `(1, 0, 0)`: finite, in range, and beyond the cutoff in the phantom's cube.

    Args:
        positions: Å, atoms in order of their systems.
        atomic_numbers: Of each atom.
        cell: Å; rows are lattice vectors; `(3, 3)` for one system.
        pbc: Periodicity along each lattice vector; `(3,)` for one system.
        edge_index: Senders and receivers, E >= 2.
        cell_offsets: `(E, 3)`, integers of any dtype.
        cutoff: The model's largest cutoff in Å.
        batch: System of each atom, nondecreasing; all in system 0 when None.
        charge: Of each system, in e; 0 when None.
        spin: Of each system; 0 when None.

    Returns:
        The model's input with N = n + 1 atoms and B = b + 1 systems.
    """
    n_atoms, dtype = positions.shape[0], positions.dtype
    cell, pbc = jnp.asarray(cell, dtype).reshape(-1, 3, 3), jnp.asarray(pbc, bool).reshape(-1, 3)
    n_systems = cell.shape[0]
    numbers = jnp.asarray(atomic_numbers)
    batch = jnp.zeros(n_atoms, jnp.int32) if batch is None else jnp.asarray(batch)
    phantom_number = numbers[:1] if n_atoms else jnp.ones(1, numbers.dtype)

    def per_system(values: Array | None) -> Array:
        return (
            jnp.zeros(n_systems + 1, dtype)
            if values is None
            else jnp.append(jnp.asarray(values, dtype), 0)
        )

    return {
        "pos": jnp.concatenate([positions, jnp.zeros((1, 3), dtype)]),
        "atomic_numbers": jnp.concatenate([numbers, phantom_number]),
        "cell": jnp.concatenate([cell, 2.0 * cutoff * jnp.eye(3, dtype=dtype)[None]]),
        "pbc": jnp.concatenate([pbc, jnp.ones((1, 3), bool)]),
        "edge_index": edge_index,
        "cell_offsets": jnp.asarray(cell_offsets).astype(dtype),
        "batch": jnp.append(batch, jnp.asarray(n_systems, batch.dtype)),
        "charge": per_system(charge),
        "spin": per_system(spin),
    }
