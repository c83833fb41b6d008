"""`examples/train.py` takes the steps that torch's own optimiser takes, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from reference import one_thread

__all__ = ["one_thread"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(reference.EXAMPLES)
    return reference.example("train")


def data():
    """A batch of clusters with their energies and gradients, as tensors."""
    lj = reference.potentials()["Lennard-Jones"]
    members = []
    for seed in range(3):
        system = reference.distorted(seed, pbc=(False, False, False))
        members.append(system.moved(system.positions * 1.8, system.cell))
    graph = reference.graph(members)
    out = lj(graph)
    return graph, out["energy"][:3], out["position_gradients"][:-1]


def steps_in_torch(network, steps):
    graph, energies, gradients = data()
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        pos = graph["pos"].clone().requires_grad_(True)
        found = network(graph | {"pos": pos})
        (slopes,) = torch.autograd.grad(found.sum(), pos, create_graph=True)
        in_energy = (found[:3] - energies) * 3 / len(gradients)
        in_forces = slopes[:-1] - gradients
        (100 * in_energy.square().mean() + in_forces.square().mean()).backward()
        optimiser.step()


@pytest.mark.usefixtures("x64")
def test_steps_are_those_of_torchs_adam(example):
    network = example.Network().double()
    graph, energies, gradients = data()
    input = {key: jnp.asarray(value.numpy()) for key, value in graph.items()}
    known = input, jnp.asarray(energies.numpy()), jnp.asarray(gradients.numpy())
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        trained = example.train(network, known, 10)
    before = {key: weight.detach().clone() for key, weight in network.named_parameters()}
    steps_in_torch(network, 10)
    for key, weight in network.named_parameters():
        assert not torch.allclose(weight, before[key])
        np.testing.assert_allclose(trained[key], weight.detach().numpy(), rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_training_reduces_the_errors_and_writes_a_potential(example, tmp_path, monkeypatch, capsys):
    path = tmp_path / "network.pt"
    options = ["--steps", "300", "--clusters", "8", "--file", str(path)]
    monkeypatch.setattr("sys.argv", ["train.py", *options])
    with jax.numpy_dtype_promotion("standard"):
        example.main()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:4]]
    in_energy, in_forces = ([float(row[i]) for row in rows] for i in (-5, -2))
    assert in_energy[2] < 0.1 * in_energy[0]
    assert in_forces[2] < 0.7 * in_forces[0]
    graph, _, _ = data()
    out = torch.jit.load(path)(
        {key: x.float() if x.is_floating_point() else x for key, x in graph.items()}
    )
    assert out["position_gradients"].shape == graph["pos"].shape
