"""Graphs for tests: the reference systems as JAX arrays, in any order, with any padding."""

import jax.numpy as jnp
import jaxlib
import numpy as np
import reference
import torch
from reference import CUTOFF

from torchcall.mliap import AtomGraph, TorchMliap

# For programs that are called only once or twice.
QUICK: dict[str, int] = {"xla_backend_optimization_level": 0}
if tuple(map(int, jaxlib.__version__.split(".")[:2])) < (0, 11):  # newer ones lack the option
    QUICK["xla_cpu_use_fusion_emitters"] = False


def script(module):
    return torch.jit.script(module.eval())


def potential(name, **options):
    """A model of the examples in double precision, with cell gradients."""
    module = reference.potentials()[name]
    return TorchMliap.from_module(script(module), CUTOFF, True, **options)


def atom_graph(members, *, dtype: type = np.float64, slots=0, reach=CUTOFF, **fields):
    """The graph of some systems, with `slots` unused edge slots."""
    arrays = {k: v.numpy() for k, v in reference.graph(members, reach=reach, phantom=False).items()}
    n, e = len(arrays["pos"]), arrays["edge_index"].shape[1]
    index = np.concatenate([arrays["edge_index"], np.full((2, slots), n)], 1)
    offsets = np.concatenate([arrays["cell_offsets"], np.tile([1.0, 0, 0], (slots, 1))])
    graph = {
        "positions": arrays["pos"].astype(dtype),
        "atomic_numbers": arrays["atomic_numbers"].astype(np.int32),
        "cell": arrays["cell"].astype(dtype),
        "pbc": arrays["pbc"],
        "batch": arrays["batch"].astype(np.int32),
        "edge_index": index.astype(np.int32),
        "cell_offsets": offsets.astype(dtype),
        "n_edges": np.int32(e),
    }
    return AtomGraph(**{k: jnp.asarray(v) for k, v in (graph | fields).items()})


def shuffled(graph, seed, *, padding=0):
    """The atoms in random order among `padding` padded ones, and their new indices."""
    generator = np.random.default_rng(seed)
    n = len(graph.positions)
    places = generator.permutation(n + padding)[:n]

    def spread(values, fill):
        out = np.full((n + padding, *values.shape[1:]), fill, values.dtype)
        out[places] = values
        return jnp.asarray(out)

    index = np.asarray(graph.edge_index)
    moved = np.where(index < n, np.append(places, 0)[np.minimum(index, n)], n + padding)
    return AtomGraph(
        positions=spread(graph.positions, 0.3),
        atomic_numbers=spread(graph.atomic_numbers, 99),
        cell=graph.cell,
        pbc=graph.pbc,
        batch=spread(graph.batch, len(graph.cell)),
        edge_index=jnp.asarray(moved.astype(np.int32)),
        cell_offsets=graph.cell_offsets,
        n_edges=graph.n_edges,
    ), places
