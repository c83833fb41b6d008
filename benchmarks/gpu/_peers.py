"""Torch alone, and JAX's callbacks, on a GPU, each as good as it gets.

All get what a JAX program has, int32 indices among them, in inputs that do not change, and leave
their results in outputs that are there already: the casts and copies that torchcall makes too.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from _common import Device, Run
from jax.experimental.buffer_callback import buffer_callback

from torchcall.demo._timing import timed
from torchcall.mliap import AtomGraphInput
from torchcall.mliap._input import input_dtypes, output_specs

Forward = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
KEYS = ("energy", "position_gradients")


class Torch:
    """A model with static inputs and outputs, called by torch alone.

    Args:
        forward: The model.
        graph: Its input, as a JAX program has it.
        device: Where to run.
    """

    def __init__(self, forward: Forward, graph: AtomGraphInput, device: Device) -> None:
        self.forward = forward
        self.device = device
        self.given = {
            key: torch.from_numpy(np.array(value)).to(device.of_torch)
            for key, value in graph.items()
        }
        specs = output_specs(graph)
        self.results = [torch.zeros(specs[key].shape, device=device.of_torch) for key in KEYS]

    def call(self) -> None:
        """Casts, the model, and copies of what it returns."""
        casts = input_dtypes()
        outputs = self.forward(
            {key: tensor.to(casts[key] or tensor.dtype) for key, tensor in self.given.items()}
        )
        for result, key in zip(self.results, KEYS, strict=True):
            result.copy_(outputs[key])

    def loop(self) -> Run:
        """`run(calls)`: calls in a Python loop."""

        def run(calls: int) -> float:
            def in_a_row() -> None:
                for _ in range(calls):
                    self.call()
                self.device.wait()

            return timed(in_a_row)

        return run

    def graph_loop(self) -> Run:
        """`run(calls)`: inputs copied into static buffers, a CUDA graph replayed, outputs copied.

        Raises:
            RuntimeError: The model cannot be captured.
        """
        casts = input_dtypes()
        static = {k: t.to(casts[k] or t.dtype, copy=True) for k, t in self.given.items()}
        side = torch.cuda.Stream(self.device.of_torch)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(5):  # TorchScript recompiles in its first calls
                self.forward(dict(static))
        torch.cuda.current_stream().wait_stream(side)
        recording = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recording, capture_error_mode="thread_local"):
            outputs = self.forward(dict(static))

        def run(calls: int) -> float:
            def in_a_row() -> None:
                for _ in range(calls):
                    for key, tensor in static.items():
                        tensor.copy_(self.given[key])
                    recording.replay()
                    for result, key in zip(self.results, KEYS, strict=True):
                        result.copy_(outputs[key])
                self.device.wait()

            return timed(in_a_row)

        return run


def pure_call(forward: Forward, device: Device) -> Callable[[AtomGraphInput], Any]:
    """The model through `pure_callback`: arrays to the host, to the device, and back again."""
    casts = input_dtypes()

    def host(graph: dict[str, Any]) -> dict[str, np.ndarray]:
        with warnings.catch_warnings():
            # Read-only arrays; nothing writes to them.
            warnings.simplefilter("ignore")
            tensors = {
                key: torch.as_tensor(np.asarray(value)).to(device.of_torch, casts[key])
                for key, value in graph.items()
            }
        outputs = forward(tensors)
        return {key: outputs[key].detach().cpu().numpy() for key in KEYS}

    def call(graph: AtomGraphInput) -> Any:
        return jax.pure_callback(host, output_specs(graph), graph)

    return call


def buffer_call(forward: Forward, device: Device) -> Callable[[AtomGraphInput], Any]:
    """The model through `buffer_callback`: XLA's buffers by DLPack, on XLA's stream."""
    casts = input_dtypes()
    streams: dict[int, torch.cuda.ExternalStream] = {}

    def on_stream(context: Any, results: Any, graph: dict[str, Any]) -> None:
        if not device.is_gpu:
            return run(results, graph)
        handle = int(context.stream)
        if handle not in streams:
            streams[handle] = torch.cuda.ExternalStream(handle, device.of_torch)
        with torch.cuda.stream(streams[handle]):
            return run(results, graph)

    def run(results: dict[str, Any], graph: dict[str, Any]) -> None:
        tensors = {}
        for key, value in graph.items():
            tensor = torch.from_dlpack(value)
            tensors[key] = tensor.to(casts[key] or tensor.dtype)
        outputs = forward(tensors)
        for key, result in results.items():
            torch.from_dlpack(result).copy_(outputs[key].detach())

    def call(graph: AtomGraphInput) -> Any:
        return buffer_callback(on_stream, output_specs(graph))(graph)

    return call
