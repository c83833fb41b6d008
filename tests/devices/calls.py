"""Calls on simulated devices. Run by test_simulated_devices.py."""

import jax
import numpy as np
import pytest
import torch
from devices.machine import STREAM, Machine
from devices.potentials import Forces, eager_forces, force_input, script
from torch import Tensor, nn

from torchcall import TorchModuleWrapper
from torchcall._call.call import CallOptions
from torchcall._command.included import load_example
from torchcall.mliap import AtomGraph, TorchMliap, neighbor_list, pad_graph
from torchcall.mliap._input import narrowing

X = np.arange(12, dtype=np.float32).reshape(3, 4)
SAME = jax.ShapeDtypeStruct(X.shape, X.dtype)


def double(x: Tensor) -> Tensor:
    return x * 2


def test_a_call_runs_on_xlas_stream_without_synchronising(machine):
    f = TorchModuleWrapper(torch.jit.script(double), cuda_graph="off")
    call = machine.prepared(f, X)
    np.testing.assert_array_equal(call(X, ordinal=1), 2 * X)
    machine.reset()
    np.testing.assert_array_equal(call(3 * X, ordinal=1), 6 * X)
    operators = machine.device.log("op")
    assert {(entry.device, entry.stream) for entry in operators} == {(1, STREAM)}
    assert machine.device.log("sync") == []
    assert machine.driver.log() == []
    assert machine.device.current_device() == 0
    assert f.stats()["devices"] == ["cuda:1"]


@pytest.mark.parametrize("make", [script, eager_forces], ids=["TorchScript", "eager"])
def test_forces_equal_the_cpu_and_the_backward_pass_runs_on_another_thread(machine, make):
    f = make(Forces(), cuda_graph="off")
    x = force_input()
    expected = f(*x)
    call = machine.prepared(f, *x)
    for _ in range(2):
        machine.reset()
        got = call(*x)
        for g, e in zip(got, expected, strict=True):
            np.testing.assert_array_equal(g, e)
    operators = machine.device.log("op")
    assert {(entry.device, entry.stream) for entry in operators} == {(0, STREAM)}
    assert len({entry.thread for entry in operators}) == 2
    assert machine.device.log("sync") == []


def test_inputs_are_protected_from_in_place_operations(machine):
    def in_place(x: Tensor) -> Tensor:
        return x.mul_(3)

    for f in (TorchModuleWrapper(torch.jit.script(in_place)), TorchModuleWrapper(in_place)):
        np.testing.assert_array_equal(machine.call(f, X), 3 * X)
        assert f.stats()["copied_inputs"] == 1


def test_a_retained_input_is_a_private_copy(machine):
    class Retaining(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            return x + 1

    model = Retaining()
    f = TorchModuleWrapper(model, cuda_graph="off")
    call = machine.prepared(f, X)
    model.last = None
    call(X)
    retained = f._source._replicas.on("cuda:0").last
    call(5 * X)
    assert retained.device.type == "cuda"
    np.testing.assert_array_equal(retained.cpu().numpy(), X)


def test_an_output_on_another_device_is_an_error(machine):
    f = TorchModuleWrapper(lambda x: x.cpu(), output_spec=SAME)
    with pytest.raises(RuntimeError, match="expected a dense tensor on cuda:0, got Strided on cpu"):
        machine.call(f, X)


def test_later_calls_work_after_the_model_raised(machine):
    def picky(x: Tensor) -> Tensor:
        if bool((x > 100).any()):
            raise ValueError("too large")
        return x * 2

    f = TorchModuleWrapper(picky, cuda_graph="off", output_spec=SAME)
    call = machine.prepared(f, X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="too large"):
            call(X + 1000)
        np.testing.assert_array_equal(call(X), 2 * X)


def test_an_out_of_memory_error_names_the_memory_fraction(machine):
    f = TorchModuleWrapper(lambda x: (x[:, None] * torch.ones(1, 4096, 1, device=x.device)).sum(1))
    call = machine.prepared(f, X)
    machine.device.limit(machine.device.live_bytes() + 1000)
    with pytest.raises(RuntimeError, match="XLA_PYTHON_CLIENT_MEM_FRACTION"):
        call(X)
    machine.device.limit(1 << 30)
    np.testing.assert_allclose(call(X), 4096 * X, rtol=1e-5)


def test_valid_lengths_are_not_read_on_a_device(machine):
    module = load_example("lennard_jones").LennardJones(cutoff=4.0)
    model = TorchMliap.from_module(module, 4.0, cuda_graph="off")
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(3.0)] * 3), -1).reshape(-1, 3)
    positions = (3.2 * grid + rng.normal(scale=0.1, size=(27, 3))).astype(np.float32)
    cell = 9.6 * np.eye(3, dtype=np.float32)[None]
    pbc, batch = np.ones((1, 3), bool), np.zeros(27, np.int32)
    nbrs = neighbor_list(4.0).allocate(positions, cell, pbc, batch)
    graph = AtomGraph.from_neighbors(nbrs, positions, cell, np.full(27, 18, np.int32))
    padded, masks = pad_graph(graph, cutoff=4.0, n_atoms=40, n_edges=graph.edge_index.shape[1] + 9)
    expected = model.call(padded)
    options = CallOptions(model.output_specs(padded), narrowing(tuple(expected)))
    lengths = (np.int32(masks.n_atoms), np.int32(masks.n_edges))
    call = machine.prepared(model.wrapper, padded, options=options)
    call(padded, lengths=lengths)
    machine.reset()
    got = call(padded, lengths=lengths)
    assert machine.device.log("sync") == []
    np.testing.assert_array_equal(got["energy"], expected["energy"])
    np.testing.assert_array_equal(got["position_gradients"], expected["position_gradients"])


# Replicas


def copies(machine: Machine) -> int:
    """The number of host-to-device copies, which weights need."""
    return len([e for e in machine.device.log("sync") if "copy" in e.name])


@pytest.mark.parametrize("make", [script, eager_forces], ids=["TorchScript", "eager"])
def test_weights_are_copied_once_per_device(machine, make):
    model = Forces()
    f = make(model, cuda_graph="off")
    x = force_input()
    for ordinal in (0, 1):
        call = machine.prepared(f, *x)
        machine.reset()
        call(*x, ordinal=ordinal)
        assert copies(machine) >= 4  # two layers, weight and bias each
        machine.reset()
        call(*x, ordinal=ordinal)
        assert machine.device.log("sync") == []
    assert f.stats()["devices"] == ["cuda:0", "cuda:1"]
    assert {weight.device.type for weight in model.parameters()} == {"cpu"}


def test_the_host_synchronises_after_copying_weights(machine):
    f = script(Forces(), cuda_graph="off")
    machine.call(f, *force_input())
    syncs = machine.device.log("sync")
    assert "device" in syncs[-1].name.lower()


@pytest.mark.parametrize("make", [script, eager_forces], ids=["TorchScript", "eager"])
def test_a_refresh_synchronises_before_it_frees_old_weights(machine, make):
    f = make(Forces(), cuda_graph="off")
    machine.call(f, *force_input())
    machine.reset()
    f.refresh()
    assert [e.name for e in machine.device.log("sync") if "device" in e.name.lower()]


@pytest.mark.parametrize("make", [script, eager_forces], ids=["TorchScript", "eager"])
def test_weights_already_on_the_device_are_shared(machine, make):
    model = Forces().to("cuda:1")
    f = make(model, cuda_graph="off")
    x = force_input()
    before = machine.call(f, *x, ordinal=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    after = machine.call(f, *x, ordinal=1)
    assert f.stats()["weights"] == "shared"
    assert not np.allclose(before[1], after[1])
    np.testing.assert_array_equal(after[1], machine.call(f, *x, ordinal=0)[1])


def test_the_constants_of_a_traced_module_are_moved(machine):
    class WithConstants(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.zeros(4)

    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(WithConstants(), torch.ones(3, 4))
    f = TorchModuleWrapper(traced, cuda_graph="off")
    np.testing.assert_array_equal(machine.call(f, X), X * np.array([1, 2, 3, 4], np.float32))


def test_a_module_traced_on_a_device_runs_on_the_cpu_too(machine):
    class MakesTensors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight + torch.full((4,), 2.0, device=x.device)

    model = MakesTensors().to("cuda:1")
    traced = torch.jit.trace(model, torch.ones(3, 4, device="cuda:1"), check_trace=False)
    f = TorchModuleWrapper(traced, output_spec=SAME, cuda_graph="off")
    np.testing.assert_array_equal(machine.call(f, X, ordinal=0), X + 2)
    np.testing.assert_array_equal(machine.call(f, X, ordinal=1), X + 2)
    np.testing.assert_array_equal(f(X), X + 2)


def test_tensor_attributes_of_a_module_without_weights_are_moved(machine):
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.arange(4.0)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table

    f = TorchModuleWrapper(torch.jit.script(Table()), cuda_graph="off")
    for ordinal in (0, 1):
        np.testing.assert_array_equal(machine.call(f, X, ordinal=ordinal), X * np.arange(4.0))
    np.testing.assert_array_equal(f(X), X * np.arange(4.0))


def test_a_frozen_module_runs_on_a_device(machine):
    f = script(Forces().eval(), freeze=True, cuda_graph="off")
    x = force_input()
    for g, e in zip(machine.call(f, *x), f(*x), strict=True):
        np.testing.assert_array_equal(g, e)
