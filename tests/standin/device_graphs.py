"""Tests of captures and replays on simulated devices. Run by test_standin_torch.py."""

import ctypes
import gc

import pytest
import torch
from devices.potentials import Forces
from standin.driver import Driver
from standin.torch_device import TorchDevice
from standin.torch_graphs import simulated_cuda

EDGES = ((0, 1, 2, 3), (1, 2, 3, 4))


@pytest.fixture
def driver():
    driver = Driver()
    driver.reset()
    return driver


@pytest.fixture(autouse=True)
def device(driver):
    device = TorchDevice()
    device.reset()
    with simulated_cuda(device, driver):
        yield device
    gc.collect()


def captured(function, *inputs):
    """The captured graph and the function's outputs."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.device(inputs[0].device), torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        outputs = function(*inputs)
        graph.capture_end()
    return graph, outputs


@pytest.mark.parametrize("index", [0, 1])
def test_the_driver_replays_a_force_model_on_new_inputs(device, driver, index):
    torch.manual_seed(0)
    model, edges = Forces().to(f"cuda:{index}"), torch.tensor(EDGES, device=f"cuda:{index}")
    static = torch.zeros(5, 3, device=f"cuda:{index}")
    new = torch.randn(5, 3).to(static.device)
    expected = model(new.clone(), edges)
    graph, outputs = captured(lambda pos: model(pos.detach(), edges), static)

    cuda, stream, instance = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(0x51), ctypes.c_void_p()
    handle = ctypes.c_void_p(graph.raw_cuda_graph())
    driver.need_context(False)
    assert (
        cuda.cuGraphInstantiateWithFlags(ctypes.byref(instance), handle, ctypes.c_ulonglong(0)) == 0
    )
    device.reset()
    to, source = ctypes.c_uint64(static.data_ptr()), ctypes.c_uint64(new.data_ptr())
    assert cuda.cuMemcpyDtoDAsync_v2(to, source, ctypes.c_size_t(new.nbytes), stream) == 0
    assert cuda.cuGraphLaunch(instance, stream) == 0
    assert {entry.kind for entry in device.log()} == {"replay"}
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)

    graph.reset()
    assert cuda.cuGraphLaunch(instance, stream) == 0
    assert device.names("error") == ["graph was released"]


def test_a_graph_retains_no_tensor_and_frees_its_memory(device):
    before = device.live_bytes()
    static = torch.ones(64, device="cuda:0")
    graph, output = captured(lambda x: (x * 2 + 1).sum(), static)
    static.fill_(3)
    graph.replay()
    assert output.item() == 7 * 64
    assert device.names("error") == []
    del static, output
    assert device.live_bytes() > before
    graph.reset()
    assert device.live_bytes() == before


def test_synchronising_invalidates_a_capture():
    static = torch.ones(4, device="cuda:0")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        assert torch.cuda.is_current_stream_capturing()
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            (static * 2).sum().item()
        for later_call in (lambda: static * 2, graph.capture_end):
            with pytest.raises(RuntimeError, match="previous error during capture"):
                later_call()
        assert not torch.cuda.is_current_stream_capturing()
    assert (static * 2).sum().item() == 8
