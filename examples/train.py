"""Trains a potential written in PyTorch on energies and forces, in JAX with optax.

    python examples/train.py            # half a minute; needs ase and optax

The potential is a small network: the energy of an atom depends on its distances to others through
radial functions. The data are argon clusters, shaken at random; their reference is Lennard-Jones.
`torchcall.functional` makes parameters and a function of the module. Forces are the gradient of
that function by the positions, so the gradient of the loss is a second derivative. torch's autograd
computes both, inside one jitted step. The trained potential is written for `torchcall md`:

    torchcall md --structure examples/argon.xyz --model argon_network.pt
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from ase.cluster import Icosahedron
from lennard_jones import LennardJones

import torchcall
from torchcall.mliap import (
    AtomGraph,
    TorchMliap,
    edge_vectors,
    energy_and_gradients,
    geometry_from_ase,
    neighbor_list,
    pad_graph,
    with_gradients,
)

CUTOFF = 8.5  # Å
EPSILON, SIGMA = 0.0104, 3.40  # eV, Å: argon


class Network(torch.nn.Module):
    """E = Σᵢ MLP(Gᵢ) with Gᵢₖ = Σⱼ exp(−(r − cₖ)²/w²) f(r) of each atom; f vanishes at the cutoff.

    `forward` takes an `AtomGraphInput` and returns energies (B,) in eV.
    """

    centres: torch.Tensor

    def __init__(self, functions: int = 12, hidden: int = 16) -> None:
        super().__init__()
        self.cutoff = CUTOFF
        self.register_buffer("centres", torch.linspace(3.0, 7.5, functions))
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(functions, hidden),
            torch.nn.SiLU(),
            torch.nn.Linear(hidden, 1),
        )

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        vectors = edge_vectors(input)
        r = (vectors * vectors).sum(1).sqrt()
        envelope = (1 - (r / self.cutoff).clamp(max=1.0).square()).pow(3)
        radial = torch.exp(-4 * (r.unsqueeze(1) - self.centres).square()) * envelope.unsqueeze(1)
        sender = input["edge_index"][0]
        n_atoms, n_systems = input["pos"].size(0), input["cell"].size(0)
        shape = [n_atoms, self.centres.size(0)]
        sums = torch.zeros(shape, dtype=r.dtype, device=r.device).index_add(0, sender, radial)
        per_atom = self.layers(sums).squeeze(1)
        total = torch.zeros(n_systems, dtype=r.dtype, device=r.device)
        return total.index_add(0, input["batch"], per_atom)


def clusters(count: int, seed: int) -> tuple[dict[str, Any], jax.Array, jax.Array]:
    """Clusters of 13 atoms as one `AtomGraphInput`, their energies and position gradients."""
    generator = np.random.default_rng(seed)
    members = []
    for _ in range(count):
        atoms = Icosahedron("Ar", noshells=2, latticeconstant=5.4)
        atoms.positions *= generator.uniform(0.98, 1.1)
        atoms.rattle(0.15, rng=generator)
        members.append(atoms)
    positions, cell, pbc, batch = map(jnp.asarray, geometry_from_ase(members))
    numbers = jnp.full(len(positions), 18, jnp.int32)
    neighbors = neighbor_list(CUTOFF).allocate(positions, cell, pbc, batch)
    graph = AtomGraph.from_neighbors(neighbors, positions, cell, numbers)
    lj = torch.jit.script(LennardJones(EPSILON, SIGMA, CUTOFF))
    reference = TorchMliap.from_module(lj, CUTOFF, requires_grad=False)
    out = energy_and_gradients(reference, graph)
    input: Any = pad_graph(graph, cutoff=CUTOFF)[0]
    return input, out.energy, out.position_gradients


def function_of(network: torch.nn.Module) -> tuple[dict[str, jax.Array], Any]:
    """The network's parameters, and `predict(parameters, input) → (energies, gradients)`."""
    index = {"atomic_numbers", "batch", "edge_index"}
    keys = ("pos", "cell", "pbc", "cell_offsets", "charge", "spin", *index)
    casts = {key: torch.int64 if key in index else None for key in keys}
    parameters, apply = torchcall.functional(
        torch.jit.script(network), input_spec=((None, casts), {})
    )

    def predict(
        parameters: dict[str, jax.Array], input: dict[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        def total(pos: jax.Array) -> tuple[jax.Array, jax.Array]:
            energies = apply(parameters, {**input, "pos": pos})
            return jnp.sum(energies), energies

        gradients, energies = jax.grad(total, has_aux=True)(input["pos"])
        return energies, gradients

    return parameters, predict


def errors(
    predict: Any, parameters: dict[str, jax.Array], data: tuple[Any, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Mean squares of the errors of the energies per atom, (eV)², and of the forces, (eV/Å)²."""
    input, energies, gradients = data
    found, slopes = predict(parameters, input)
    per_atom = len(energies) / len(gradients)
    in_energy = per_atom * (found[: len(energies)] - energies)  # without the phantoms
    in_forces = slopes[: len(gradients)] - gradients
    return jnp.mean(in_energy**2), jnp.mean(in_forces**2)


def train(
    network: torch.nn.Module, data: Any, steps: int, rate: float = 5e-3
) -> dict[str, jax.Array]:
    """The network's parameters after `steps` of Adam, all in one program."""
    parameters, predict = function_of(network)
    optimiser = optax.adam(rate)

    def loss(parameters: dict[str, jax.Array]) -> jax.Array:
        in_energy, in_forces = errors(predict, parameters, data)
        return 100 * in_energy + in_forces

    def step(carry: Any, _: Any) -> tuple[Any, None]:
        parameters, state = carry
        updates, state = optimiser.update(jax.grad(loss)(parameters), state)
        return (optax.apply_updates(parameters, updates), state), None

    @jax.jit
    def run(parameters: Any) -> Any:
        start = parameters, optimiser.init(parameters)
        return jax.lax.scan(step, start, None, steps)[0][0]

    return run(parameters)


def main() -> None:
    """Trains the network, prints its errors, and writes it."""
    parser = argparse.ArgumentParser(description="Train a potential on energies and forces.")
    parser.add_argument("--steps", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--clusters", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--file", default="argon_network.pt", help="default: %(default)s")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = Network()
    data, others = clusters(options.clusters, seed=0), clusters(options.clusters, seed=1)
    _, predict = function_of(network)
    start = {key: jnp.array(value.detach().numpy()) for key, value in network.named_parameters()}
    trained = train(network, data, options.steps)
    for name, parameters in (("before", start), ("after", trained)):
        for kind, known in (("training data", data), ("other clusters", others)):
            in_energy, in_forces = (
                1e3 * float(jnp.sqrt(x)) for x in errors(predict, parameters, known)
            )
            print(f"{name:6}, {kind:14}: {in_energy:8.2f} meV/atom, forces {in_forces:8.2f} meV/Å")

    weights = {key: torch.tensor(np.asarray(value)) for key, value in trained.items()}
    network.load_state_dict(weights, strict=False)
    torch.jit.script(with_gradients(network)).save(options.file)
    print(f"wrote {options.file}")


if __name__ == "__main__":
    main()
