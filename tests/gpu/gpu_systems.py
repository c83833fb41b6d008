"""Atomic systems, potentials and graphs for the GPU tests, without ASE."""

import importlib.util
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchcall.mliap import AtomGraph, neighbor_list

EXAMPLES = Path(__file__).parents[2] / "examples"
CUTOFF = 4.5
SEARCH = neighbor_list(CUTOFF, skin=0.4, capacity_multiplier=1.3)


def example(name):
    """Imports an example by name."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lennard_jones():
    make = example("lennard_jones").LennardJones
    return make(0.02, 2.6, CUTOFF, cell_gradients=True, autograd=True).eval()


def network():
    return example("message_passing").MessagePassing(CUTOFF, cell_gradients=True).eval()


POTENTIALS = {"Lennard-Jones": lennard_jones, "message passing": network}


def systems(seed=0, *, move=0.0):
    """Two triclinic systems of 27 and 8 atoms: positions, cells, periodicities, batch."""
    generator = np.random.default_rng(seed)
    positions, cells = [], []
    for n in (3, 2):
        lattice = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 3)
        cell = 3.0 * n * (np.eye(3) + np.random.default_rng(n).uniform(-0.1, 0.1, (3, 3)))
        noise = np.random.default_rng(n + 10).normal(scale=0.1, size=lattice.shape)
        positions.append(lattice / n @ cell + noise)
        cells.append(cell)
    together = np.concatenate(positions)
    together = together + move * generator.normal(size=together.shape)
    batch = np.repeat([0, 1], [27, 8]).astype(np.int32)
    pbc = np.array([[True, True, True], [True, True, False]])
    return together.astype(np.float32), np.array(cells, np.float32), pbc, batch


def graph_on(device, positions, cell, pbc, batch):
    """The systems' graph and neighbour list, with all arrays on the device."""
    with jax.default_device(device):
        arrays = [jnp.asarray(a) for a in (positions, cell, pbc, batch)]
        neighbors = SEARCH.allocate(*arrays)
    return graph_of(arrays, neighbors), neighbors


@lru_cache
def graphs_on(device, n):
    """`n` geometries of the systems with their graphs, all of one shape."""
    _, neighbors = graph_on(device, *systems())
    rebuild = jax.jit(lambda neighbors, r, h: neighbors.rebuild(r, h))
    result = []
    for seed in range(n):
        arrays = systems(seed, move=0.02)
        with jax.default_device(device):
            placed = [jnp.asarray(a) for a in arrays]
            listed = rebuild(neighbors, *placed[:2])
        assert not bool(listed.did_overflow)
        result.append((arrays, graph_of(placed, listed)))
    return result


def graph_of(arrays, neighbors):
    """The graph of positions, cell, pbc, batch and their neighbour list."""
    positions, cell, pbc, batch = arrays
    return AtomGraph(
        positions=positions,
        atomic_numbers=jnp.full(positions.shape[0], 18, jnp.int32),
        cell=cell,
        pbc=pbc,
        batch=batch,
        edge_index=neighbors.edge_index,
        cell_offsets=neighbors.cell_offsets,
        n_edges=neighbors.n_edges,
    )


def reference(module, positions, cell, pbc, batch):
    """Energies and gradients: eager torch in float64 on the CPU, brute-force edges."""
    edges, offsets = [], []
    shifts = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    x, h = positions.astype(float), cell.astype(float)
    for s in range(len(h)):
        allowed = shifts[(shifts[:, ~pbc[s]] == 0).all(1)]
        atoms = np.flatnonzero(batch == s)
        for i in atoms:
            vectors = x[atoms][:, None] - x[i] + (allowed @ h[s])[None]
            r = np.linalg.norm(vectors, axis=-1)
            for j, k in zip(*np.nonzero((r > 1e-9) & (r < CUTOFF)), strict=True):
                edges.append((i, atoms[j]))
                offsets.append(allowed[k])
    graph = {
        "pos": torch.from_numpy(x),
        "atomic_numbers": torch.full((len(x),), 18),
        "cell": torch.from_numpy(h),
        "pbc": torch.from_numpy(pbc),
        "edge_index": torch.tensor(np.array(edges).T),
        "cell_offsets": torch.from_numpy(np.array(offsets, float)),
        "batch": torch.from_numpy(batch.astype(np.int64)),
        "charge": torch.zeros(len(h), dtype=torch.float64),
        "spin": torch.zeros(len(h), dtype=torch.float64),
    }
    out = module.double()(graph)
    return {key: value.detach().numpy() for key, value in out.items()}
