"""AOTInductor packages on a GPU: compiled for it, equal to torch, refused on the CPU."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from gpu_models import ON_CPU, TORCH_DEVICE, assert_replayed, needs_gpu
from gpu_systems import CUTOFF, POTENTIALS, graph_on, graphs_on, reference, systems
from models import error_of

import torchcall
from torchcall.mliap import TorchMliap, energy_and_gradients, pad_graph

pytestmark = pytest.mark.gpu
NAME = "message passing"


@pytest.fixture(scope="module")
def package(device, tmp_path_factory):
    """One package for the device; compiling is slow."""
    with jax.default_device(device):
        graph, _ = graph_on(device, *systems())
        return torchcall.mliap.compile(
            POTENTIALS[NAME](), tmp_path_factory.mktemp("packages") / "network.pt2",
            example=graph, cutoff=CUTOFF, device=TORCH_DEVICE,
        )  # fmt: skip


@pytest.mark.parametrize("cuda_graph", ["off", "auto"])
def test_energies_and_gradients_equal_torch(package, cuda_graph, device):
    model = TorchMliap.from_package(package, cuda_graph=cuda_graph)
    evaluate = jax.jit(energy_and_gradients)
    for arrays, graph in graphs_on(device, 4):
        found = evaluate(model, graph)
        right = reference(POTENTIALS[NAME](), *arrays)
        for key in ("energy", "position_gradients", "cell_gradients"):
            scale = np.abs(right[key]).max()
            np.testing.assert_allclose(getattr(found, key), right[key], atol=2e-4 * scale)
    if cuda_graph == "auto":
        assert_replayed(model.wrapper, 4)


def test_a_loop_replays_the_package(package, device):
    model = TorchMliap.from_package(package)
    graph, _ = graph_on(device, *systems())

    @jax.jit
    def descend(positions):
        def body(_, r):
            gradient = energy_and_gradients(model, replace(graph, positions=r)).position_gradients
            return r - 1e-6 * gradient

        return jax.lax.fori_loop(0, 10, body, positions)

    assert np.isfinite(descend(graph.positions)).all()
    stats = model.wrapper.stats()
    assert stats["calls"] == 10
    assert stats["fallback"] is None
    assert stats["graph_captures"] == (0 if ON_CPU else 1)


@needs_gpu
def test_a_gpu_package_is_refused_on_the_cpu(package, device):
    model = TorchMliap.from_package(package)
    cpu = jax.devices("cpu")[0]
    graph, _ = graph_on(cpu, *systems())
    padded, _ = pad_graph(graph, cutoff=CUTOFF)

    def call():
        with jax.default_device(cpu):
            return jax.jit(model.call)(jax.device_put(padded, cpu))

    text = error_of(call)
    assert "cuda" in text
    assert "cpu" in text
    graph, _ = graph_on(device, *systems())
    assert np.isfinite(jax.jit(energy_and_gradients)(model, graph).energy).all()
