"""Tests of operators on simulated devices. Run by test_standin_torch.py."""

import threading

import pytest
import torch
from devices.potentials import Forces
from standin.torch_device import TorchDevice, borrowed

STREAM = 0x7F00


@pytest.fixture(autouse=True)
def device():
    device = TorchDevice()
    device.reset()
    return device


def test_torch_cuda_stays_unavailable():
    assert not torch.cuda.is_available()


@pytest.mark.parametrize("index", [0, 1])
def test_a_force_model_equals_the_cpu_and_runs_backward_on_the_device_thread(device, index):
    torch.manual_seed(0)
    model, pos = Forces(), torch.randn(5, 3)
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    expected = model(pos.clone(), edges)

    scripted = torch.jit.script(model).to(f"cuda:{index}")
    arguments = pos.to(f"cuda:{index}"), edges.to(f"cuda:{index}")
    device.reset()
    with device.stream(STREAM, index), torch.jit.optimized_execution(False):
        energy, gradient = scripted(*arguments)

    operators = device.log("op")
    assert {entry.device for entry in operators} == {index}
    assert {entry.stream for entry in operators} == {STREAM}
    threads = [entry.thread for entry in operators]
    backward = next(i for i, thread in enumerate(threads) if thread != threading.get_native_id())
    assert len(set(threads[:backward])) == 1
    assert operators[backward - 2].name == "aten::sum.dim_IntList"  # then the seed of ones
    assert "aten::silu_backward" in [entry.name for entry in operators[backward:]]
    assert device.log("sync") == []
    assert gradient.device == torch.device("cuda", index)
    torch.testing.assert_close((energy.cpu(), gradient.cpu()), expected, rtol=0, atol=0)


def test_views_share_storage_and_version():
    x = torch.arange(6.0, device="cuda:0")
    view = x.view(2, 3).t()[1:]
    assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
    view.add_(10)
    assert x._version == view._version == 1
    assert x.tolist() == [0, 11, 12, 3, 14, 15]
    with torch.inference_mode():
        assert not x[:2].is_inference()
        assert (x + 1).is_inference()


def test_borrowed_memory_is_written_in_place(device):
    host = torch.zeros(4)
    x = borrowed(host, 1)
    x[1:].fill_(3)
    assert x.device == torch.device("cuda:1")
    assert host.tolist() == [0, 3, 3, 3]
    assert device.log("alloc") == []


def test_resized_outputs_update_their_tensor():
    out = torch.empty(0, device="cuda:0")
    torch.add(torch.ones(2, 3, device="cuda:0"), 1, out=out)
    assert out.tolist() == [[2, 2, 2], [2, 2, 2]]
    assert out.resize_(7)[:6].tolist() == [2] * 6
    other = torch.empty(0, device="cuda:0").set_(out.untyped_storage(), 2, (2, 2), (1, 2))
    assert other.tolist() == [[2, 2], [2, 2]]
    assert out.set_().shape == (0,)


def test_which_operators_synchronise(device):
    x = torch.ones(3).to("cuda:0")
    x.to("cuda:1")
    x.sum().item()
    x[x > 0]
    x.index_select(0, torch.tensor([2]).to("cuda:0", non_blocking=True))
    torch.accelerator.synchronize(1)
    assert device.names("sync") == [
        "aten::copy_",
        "aten::_local_scalar_dense",
        "aten::index.Tensor",
        "aten::copy_",
        "device",
    ]


def test_memory_is_counted_filled_and_limited(device):
    before = device.live_bytes(1)
    with device.stream(STREAM, 1):
        x = torch.empty(256, device="cuda:1")
    (alloc,) = device.log("alloc")
    assert (alloc.name, alloc.device, alloc.stream) == ("1024", 1, STREAM)
    assert device.live_bytes(1) == before + 1024
    assert x.cpu().isnan().all()
    del x
    assert device.live_bytes(1) == before
    device.limit(before + 1023, 1)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        torch.empty(256, device="cuda:1")


def test_mixed_devices_are_an_error():
    x = torch.ones(3, 3, device="cuda:0")
    for other in (torch.ones(3, 3), torch.ones(3, 3, device="cuda:1")):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            x.mm(other)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x.index_select(0, torch.tensor([0]))
    assert (x[torch.tensor([0])] + torch.tensor(1.0)).sum().item() == 6


def test_an_injected_failure_raises_once(device):
    x = torch.ones(3, device="cuda:0")
    device.fail("aten::mul.Tensor", nth=2, message="CUDA error: an illegal memory access")
    x * 2
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        x * 2
    assert (x * 2).tolist() == [2, 2, 2]


def test_guards_set_the_current_device_and_stream(device):
    with torch.Stream("cuda:1") as stream:
        assert device.current_device() == 1
        assert device.current_stream(1) == stream.stream_id != 0
    assert (device.current_device(), device.current_stream(1)) == (0, 0)
