"""Lattice gradients and stresses on a GPU. A torch CUDA graph shows that they never synchronise."""

import numpy as np
import pytest
import torch
from gpu_models import TORCH_DEVICE, needs_gpu

from torchcall import mliap

pytestmark = pytest.mark.gpu


def everything(forces, positions, batch, cell, virial, pbc):
    """Lattice gradient, virial, stress in both conventions, pressure."""
    gradient = mliap.lattice_gradient_from_virial(forces, positions, batch, cell, virial, pbc)
    stress = mliap.stress_from_virial(virial, cell)
    return (
        gradient,
        mliap.virial_from_lattice_gradient(forces, positions, batch, cell, gradient, pbc),
        stress,
        mliap.stress_from_virial(virial, cell, convention="kups", pbc=pbc),
        mliap.pressure_from_stress(stress, pbc, convention="ase"),
    )


def arguments(seed):
    """Random forces, positions, batch, cells and symmetric virials."""
    generator = np.random.default_rng(seed)
    virial = generator.normal(size=(4, 3, 3))
    cell = 4 * np.eye(3) + generator.normal(size=(4, 3, 3))
    cell[0, 2] = 0.0  # a slab
    return [
        torch.from_numpy(array)
        for array in (
            generator.normal(size=(12, 3)),
            5 * generator.normal(size=(12, 3)),
            np.repeat(np.arange(4), 3),
            cell,
            virial + virial.swapaxes(1, 2),
            np.array([[1, 1, 1], [1, 1, 0], [0, 0, 1], [0, 0, 0]], bool),
        )
    ]


def test_results_equal_the_cpu():
    found = everything(*[value.to(TORCH_DEVICE) for value in arguments(0)])
    for got, expected in zip(found, everything(*arguments(0)), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@needs_gpu
def test_replays_of_a_torch_graph_equal_the_cpu():
    static = [value.cuda() for value in arguments(0)]
    everything(*static)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        outputs = everything(*static)
    for slot, value in zip(static, arguments(5), strict=True):
        slot.copy_(value)
    recording.replay()
    for found, expected in zip(outputs, everything(*arguments(5)), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-12, atol=1e-12, equal_nan=True)
