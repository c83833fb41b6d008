"""Slow, obvious references for potentials: systems, graphs, energies in JAX, finite differences.

Energies here are functions of one system's positions and cell over pairs that brute force listed,
written from the definitions: triplets are triplets, sums run over listed images. `graph` builds
what the torch modules receive, with ASE's neighbour list.
"""

import importlib.util
import itertools
from dataclasses import dataclass, replace
from pathlib import Path

import ase.neighborlist
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from ase import Atoms

EXAMPLES = Path(__file__).parents[2] / "examples"
CUTOFF = 4.2
LJ = {"epsilon": 0.8, "sigma": 2.05, "cutoff": CUTOFF, "onset": 3.6}


@pytest.fixture(autouse=True)
def one_thread():
    """Limits torch to one thread in modules that import this; threads slow small operations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def example(name):
    """Imports a module from examples/."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def potentials():
    """The examples' modules in double precision, with cell gradients, all within `CUTOFF`."""
    lj = example("lennard_jones").LennardJones(**LJ, cell_gradients=True)
    sw = example("stillinger_weber").StillingerWeber(cell_gradients=True)
    net = example("message_passing").MessagePassing(CUTOFF, cell_gradients=True).double()
    return {"Lennard-Jones": lj, "Stillinger-Weber": sw, "message passing": net}


@dataclass(frozen=True)
class System:
    """Atoms in Å; rows of the cell are lattice vectors, zero where there is none."""

    positions: np.ndarray
    numbers: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray

    def moved(self, positions, cell):
        return replace(self, positions=positions, cell=cell)


def distorted(seed, *, pbc=(True, True, True), vacuum=0.0):
    """Eight atoms of two elements, near a sheared diamond lattice, some of them outside the cell.

    The lattice vectors of open axes are scaled by `vacuum`.
    """
    generator = np.random.default_rng(seed)
    pbc = np.array(pbc)
    corners = np.array([[0, 0, 0], [0, 2, 2], [2, 0, 2], [2, 2, 0]]) / 4
    frac = np.concatenate([corners, corners + 0.25])
    strain = np.eye(3) + generator.uniform(-0.1, 0.1, (3, 3))
    cell = 5.43 * np.eye(3) @ strain
    unwrap = generator.integers(-1, 2, frac.shape) * pbc
    positions = (frac + unwrap) @ cell + generator.normal(scale=0.08, size=frac.shape)
    cell = np.where(pbc[:, None], cell, vacuum * cell)
    return System(positions, generator.choice([6, 14], len(frac)), cell, pbc)


def systems():
    """A system of each kind, by name.

    The seeds keep every pair at least 0.01 Å from either end of the Lennard-Jones switch: its third
    derivative jumps there, and fourth-order differences need five continuous derivatives.
    """
    mirrored = distorted(10)
    return {
        "triclinic": distorted(18),
        "left-handed": mirrored.moved(mirrored.positions, mirrored.cell[[1, 0, 2]]),
        "slab": distorted(13, pbc=(True, True, False)),
        "slab with a vacuum vector": distorted(23, pbc=(True, False, True), vacuum=4.0),
        "wire": distorted(9, pbc=(False, True, False)),
        "molecule": distorted(5, pbc=(False, False, False)),
    }


def graph(members, *, reach=CUTOFF, phantom=True, n_atoms=1, n_edges=3, dtype=torch.float64):
    """The torch `AtomGraphInput` of systems, with `n_atoms` phantoms and `n_edges` unused edges."""
    edges, offsets, first = [], [], 0
    for member in members:
        atoms = Atoms(member.numbers, member.positions, cell=member.cell, pbc=member.pbc)
        i, j, shifts = ase.neighborlist.neighbor_list("ijS", atoms, reach)
        edges.append(np.stack([i, j]) + first)
        offsets.append(shifts)
        first += len(atoms)
    parts = list(members)
    if phantom:
        real = np.concatenate([member.numbers for member in members])
        numbers = np.full(n_atoms, real[0] if len(real) else 1)
        cube = np.eye(3) * 2 * CUTOFF
        parts.append(System(np.zeros((n_atoms, 3)), numbers, cube, np.ones(3, bool)))
        edges.append(np.full((2, n_edges), first))
        offsets.append(np.tile([1, 0, 0], (n_edges, 1)))
    none = torch.zeros(len(parts), dtype=dtype)
    return {
        "pos": torch.tensor(np.concatenate([p.positions for p in parts]), dtype=dtype),
        "atomic_numbers": torch.tensor(np.concatenate([p.numbers for p in parts])),
        "cell": torch.tensor(np.stack([p.cell for p in parts]), dtype=dtype),
        "pbc": torch.tensor(np.stack([p.pbc for p in parts])),
        "edge_index": torch.tensor(np.concatenate(edges, 1)),
        "cell_offsets": torch.tensor(np.concatenate(offsets), dtype=dtype),
        "batch": torch.tensor(np.repeat(np.arange(len(parts)), [len(p.numbers) for p in parts])),
        "charge": none,
        "spin": none,
    }


def random_batch(seed=0, n_systems=4, n_atoms=12, dtype=torch.float64):
    """Random forces, positions, batch, cells and symmetric virials, of no real potential.

    The forces of a system sum to zero.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    virial = normal(n_systems, 3, 3)
    batch = torch.arange(n_atoms) * n_systems // max(n_atoms, 1)
    cell = 4.0 * torch.eye(3, dtype=dtype) + normal(n_systems, 3, 3)
    symmetric = virial + virial.transpose(1, 2)
    member = torch.nn.functional.one_hot(batch, n_systems).to(dtype)
    forces = normal(n_atoms, 3)
    forces -= member @ ((member.T @ forces) / member.sum(0).clamp(min=1)[:, None])
    return forces, 5.0 * normal(n_atoms, 3), batch, cell, symmetric


def as_jax(*tensors):
    return [jnp.asarray(tensor.numpy()) for tensor in tensors]


# Finite differences: every displaced copy of a system is one more system of a single batch.

STENCIL = ((1, 8 / 12), (-1, -8 / 12), (2, -1 / 12), (-2, 1 / 12))


def fourth_order(energies, shape, step=2.5e-4):
    """dE/dx at x = 0, `energies` mapping displacements `(K, *shape)` to `(K,)`; error O(step⁴)."""
    units = np.eye(int(np.prod(shape))).reshape(-1, *shape)
    moves = np.concatenate([step * k * units for k, _ in STENCIL])
    values = np.asarray(energies(moves)).reshape(len(STENCIL), -1)
    weights = np.array([w for _, w in STENCIL]) / step
    return (weights @ values).reshape(shape)


def energies(module, system, positions, cells):
    """Energies of copies of a system at `(K, N, 3)`, `(K, 3, 3)`; edges extend past the cutoff."""
    copies = len(positions)
    one = graph([system], reach=CUTOFF + 0.1, phantom=False)
    shift = torch.arange(copies).repeat_interleave(one["edge_index"].shape[1]) * len(one["pos"])
    inputs = {key: value.repeat(copies, *[1] * (value.dim() - 1)) for key, value in one.items()}
    inputs["edge_index"] = one["edge_index"].repeat(1, copies) + shift
    inputs["pos"] = torch.tensor(positions).reshape(-1, 3)
    inputs["cell"] = torch.tensor(cells)
    inputs["batch"] = torch.arange(copies).repeat_interleave(len(one["pos"]))
    return module(inputs)["energy"].numpy()


def strain_derivative(module, system):
    """dE/dε of `r → r + r ε`, `h → h + h ε` over nine independent strains, `(3, 3)` in eV."""

    def strained(strains):
        deform = np.eye(3) + strains
        return energies(module, system, system.positions @ deform, system.cell @ deform)

    return fourth_order(strained, (3, 3))


def cell_derivative(module, system, *, fixed):
    """∂E/∂h at fixed "cartesian" or "fractional" positions, `(3, 3)` in eV/Å."""

    def moved(moves):
        cells = system.cell + moves
        positions = np.broadcast_to(system.positions, (len(moves), *system.positions.shape))
        if fixed == "fractional":
            positions = positions @ np.linalg.inv(system.cell) @ cells
        return energies(module, system, positions, cells)

    return fourth_order(moved, (3, 3))


def position_derivative(module, system):
    """∂E/∂r, `(N, 3)` in eV/Å."""

    def moved(moves):
        cells = np.broadcast_to(system.cell, (len(moves), 3, 3)).copy()
        return energies(module, system, system.positions + moves, cells)

    return fourth_order(moved, system.positions.shape)


# Energies in JAX. Edges `(i, j, S)` come from brute force over a box of images, slightly beyond the
# cutoff, so that pairs may enter the cutoff without a new list.


def brute_force(system, cutoff=CUTOFF, margin=0.1, images=4):
    """All `(i, j, S)` with `|x_j − x_i + S h| < cutoff + margin` but `(i, i, 0)`: `(E,)`, `(E,)`,
    `(E, 3)`.
    """
    ranges = [np.arange(-images, images + 1) if p else np.zeros(1, int) for p in system.pbc]
    box = np.stack(np.meshgrid(*ranges, indexing="ij"), -1).reshape(-1, 3)
    x = system.positions
    r = x[None, :, None] - x[:, None, None] + (box @ system.cell)[None, None]
    length = np.linalg.norm(r, axis=-1)
    atom = np.arange(len(x))
    itself = (atom[:, None] == atom)[:, :, None] & ~box.any(1)
    i, j, m = np.nonzero(~itself & (length < cutoff + margin))
    return i, j, box[m]


def vectors(positions, cell, edges):
    i, j, images = edges
    return positions[j] - positions[i] + jnp.asarray(images, cell.dtype) @ cell


def lennard_jones(system):
    """½ Σ 4ε ((σ/r)¹² − (σ/r)⁶) S(r²) over directed edges, S the quintic switch."""
    edges = brute_force(system)
    epsilon, sigma, cutoff, onset = LJ["epsilon"], LJ["sigma"], LJ["cutoff"], LJ["onset"]

    def energy(positions, cell):
        r = jnp.linalg.norm(vectors(positions, cell, edges), axis=1)
        x = jnp.clip((r**2 - onset**2) / (cutoff**2 - onset**2), 0.0, 1.0)
        switch = 1.0 - 10.0 * x**3 + 15.0 * x**4 - 6.0 * x**5
        return 0.5 * (4.0 * epsilon * ((sigma / r) ** 12 - (sigma / r) ** 6) * switch).sum()

    return energy


def stillinger_weber(system, epsilon=2.1683, sigma=2.0951):
    """½ Σ φ₂ over directed edges + Σ φ₃ over every two edges of an atom, as in the paper."""
    A, B, a, lam, gamma = 7.049556277, 0.6022245584, 1.8, 21.0, 1.2
    edges = brute_force(system, a * sigma, margin=-1e-6)
    by_atom = [np.flatnonzero(edges[0] == atom) for atom in range(len(system.positions))]
    triplets = [pair for own in by_atom for pair in itertools.combinations(own, 2)]
    first, second = np.array(triplets, int).reshape(-1, 2).T

    def energy(positions, cell):
        r = vectors(positions, cell, edges) / sigma
        d = jnp.linalg.norm(r, axis=1)
        pair = A * (B * d**-4 - 1.0) * jnp.exp(1.0 / (d - a))
        cosine = (r[first] * r[second]).sum(1) / (d[first] * d[second])
        weight = jnp.exp(gamma / (d - a))
        angle = lam * weight[first] * weight[second] * (cosine + 1.0 / 3.0) ** 2
        return epsilon * (0.5 * pair.sum() + angle.sum())

    return energy


def message_passing(system, module):
    """The network of `examples/message_passing.py`, edge by edge, with the module's weights."""
    weights = {key: jnp.asarray(value.numpy()) for key, value in module.state_dict().items()}
    edges = brute_force(system, margin=-1e-6)
    sender, receiver, n = edges[0], edges[1], len(system.positions)

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def perceptron(name, x):
        return linear(f"{name}.2", jax.nn.silu(linear(f"{name}.0", x)))

    def energy(positions, cell):
        r = vectors(positions, cell, edges)
        d = jnp.linalg.norm(r, axis=1)
        envelope = jnp.exp(1.0 - 1.0 / (1.0 - (d / CUTOFF) ** 2))
        basis = jnp.sin(d[:, None] * weights["frequency"]) / d[:, None]
        unit = r / d[:, None]
        h = weights["embedding.weight"][system.numbers]
        for k in range(len(module.layers)):
            mask = perceptron(f"layers.{k}.filter", basis) * envelope[:, None]
            message = linear(f"layers.{k}.source", h)[sender] * mask
            half = message.shape[1] // 2
            s = jax.ops.segment_sum(message[:, :half], receiver, n)
            v = jax.ops.segment_sum(unit[:, :, None] * message[:, None, half:], receiver, n)
            invariants = jnp.concatenate([s, (v**2).sum(1)], axis=1)
            h = h + perceptron(f"layers.{k}.update", invariants)
            h = h / jnp.sqrt(1.0 + (h**2).mean())
        return (perceptron("readout", h) + weights["reference.weight"][system.numbers]).sum()

    return energy


def twin(name, module, system):
    """The JAX energy of a system, a function of positions and cell."""
    if name == "message passing":
        return message_passing(system, module)
    return {"Lennard-Jones": lennard_jones, "Stillinger-Weber": stillinger_weber}[name](system)
