"""Graphs of various shapes, made from the example, to compare a package with its module."""

from typing import NamedTuple

import torch

from torchcall.mliap._compile._form import INPUTS, MINIMUM, B, E, Graph, N, Sizes, sizes_of

_RATTLE = 0.05  # Å


class Case(NamedTuple):
    """A graph and its description."""

    description: str
    graph: Graph


def resized(graph: Graph, sizes: Sizes, cutoff: float) -> Graph:
    """A graph of the given sizes: the first systems, atoms and edges of `graph`, and phantoms.

    At least one system and one atom are phantoms, in the form of `pad_graph`. Edges of removed
    atoms are removed too, so the energy is not physical; it serves for comparison only.

    Args:
        graph: a graph of any shape.
        sizes: at least 2 of each.
        cutoff: in Å; half the side of the phantom system's cell.
    """
    n_atoms, n_edges, n_systems = sizes[N], sizes[E], sizes[B]
    pos, cell = graph["pos"], graph["cell"]
    n_real_systems = min(n_systems - 1, cell.shape[0])
    n_real_atoms = min(n_atoms - 1, int((graph["batch"] < n_real_systems).sum()))
    inside = (graph["edge_index"] < n_real_atoms).all(0)
    index = graph["edge_index"][:, inside][:, :n_edges]
    offsets = graph["cell_offsets"][inside][:n_edges]
    more_atoms, more_systems = n_atoms - n_real_atoms, n_systems - n_real_systems
    more_edges = n_edges - index.shape[1]

    cube = 2 * cutoff * torch.eye(3, dtype=cell.dtype, device=cell.device)
    unused = torch.tensor([1.0, 0.0, 0.0], dtype=cell.dtype, device=cell.device)
    numbers, batch = graph["atomic_numbers"], graph["batch"]
    result = {
        "pos": torch.cat([pos[:n_real_atoms], pos.new_zeros(more_atoms, 3)]),
        "atomic_numbers": torch.cat([numbers[:n_real_atoms], numbers[:1].expand(more_atoms)]),
        "cell": torch.cat([cell[:n_real_systems], cube.expand(more_systems, 3, 3)]),
        "pbc": torch.cat(
            [graph["pbc"][:n_real_systems], graph["pbc"].new_ones(more_systems, 3)],
        ),
        "edge_index": torch.cat([index, index.new_full((2, more_edges), n_real_atoms)], 1),
        "cell_offsets": torch.cat([offsets, unused.expand(more_edges, 3)]),
        "batch": torch.cat([batch[:n_real_atoms], batch.new_full((more_atoms,), n_real_systems)]),
        **{
            key: torch.cat([graph[key][:n_real_systems], graph[key][:1].expand(more_systems)])
            for key in ("charge", "spin")
        },
    }
    return {key: result[key].contiguous() for key in INPUTS}


def rattled(graph: Graph) -> Graph:
    """The graph with small displacements of all atoms, so that no force vanishes by symmetry."""
    generator = torch.Generator().manual_seed(0)
    pos = graph["pos"]
    moves = torch.randn(pos.shape, generator=generator, dtype=torch.float64) * _RATTLE
    return graph | {"pos": pos + moves.to(pos.device, pos.dtype)}


def duplicated(graph: Graph) -> Graph:
    """Two copies of the graph in one batch."""
    n, b = graph["pos"].shape[0], graph["cell"].shape[0]
    both = {key: torch.cat([value, value], -1 if key == "edge_index" else 0)
            for key, value in graph.items()}  # fmt: skip
    both["edge_index"][:, graph["edge_index"].shape[1] :] += n
    both["batch"][n:] += b
    return both


def dynamic_cases(example: Graph, cutoff: float) -> list[Case]:
    """Test graphs for a package with any numbers of atoms, edges and systems."""
    sizes = sizes_of(example)
    graph = rattled(example)
    first_only = int((example["batch"] == 0).sum())

    def size(n: int, e: int, b: int) -> Graph:
        return resized(graph, {N: max(2, n), E: max(2, e), B: max(2, b)}, cutoff)

    return [
        Case("the example", example),
        Case("the example, atoms moved", graph),
        Case("the example with more phantoms", size(sizes[N] + 7, sizes[E] + 13, sizes[B] + 2)),
        Case("a part of the example", size(sizes[N] // 2, sizes[E] // 3, sizes[B])),
        Case("the example's first system", size(first_only + 1, sizes[E], 2)),
        Case("the example twice", duplicated(graph)),
        Case("two of everything", resized(graph, MINIMUM, cutoff)),
    ]


def static_cases(example: Graph, cutoff: float) -> list[Case]:
    """Test graphs for a package with the example's sizes."""
    sizes = sizes_of(example)
    graph = rattled(example)
    half = {N: max(2, sizes[N] // 2), E: max(2, sizes[E] // 3), B: sizes[B]}
    return [
        Case("the example", example),
        Case("the example, atoms moved", graph),
        Case("a part of the example", resized(resized(graph, half, cutoff), sizes, cutoff)),
        Case("two of everything", resized(resized(graph, MINIMUM, cutoff), sizes, cutoff)),
    ]
