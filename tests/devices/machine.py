"""Two stand-in CUDA devices, and calls on them made as XLA's handler makes them.

What is real here: the call plans, both native halves, torch's interpreter and autograd, replaying
and `torchcall._capture`. What is played: the driver, torch's device, and torch's tools for capture,
whose graph, when it is launched, runs once more what was run while it was captured.
"""

import itertools
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import torch
from standin.driver import Driver
from standin.torch_device import TorchDevice

import torchcall
from torchcall import TorchModuleWrapper, _bridge, _capture

STREAM, OTHER_STREAM, SIDE_STREAM = 0x7F00, 0x7F10, 0x7F20
_graphs = itertools.count(0x600000, 16)


class Spy:
    """What the capture sees of a call: the native recording, and what is asked of it."""

    def __init__(self, recording: _bridge.Recording, machine: "Machine") -> None:
        self._recording, self._machine = recording, machine
        for name in ("name", "ordinal", "input_bytes", "output_bytes", "copy_inputs"):
            setattr(self, name, getattr(recording, name))

    def run(self, inputs: list[int], outputs: list[int], stream: int) -> None:
        machine = self._machine
        machine.runs.append((stream, machine.capturing is not None))
        before = len(machine.device.log("sync"))
        self._recording.run(inputs, outputs, stream)
        if machine.capturing is None:
            return
        if len(machine.device.log("sync")) > before:
            machine.capturing.void = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        machine.capturing.body = lambda: self._recording.run(inputs, outputs, stream)


class Graph:
    """Plays torch.cuda.CUDAGraph."""

    machine: "Machine"

    def __init__(self, keep_graph: bool = False) -> None:
        self.handle = next(_graphs)
        self.keep_graph, self.void, self.body = keep_graph, False, None

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        assert pool == (0, 1)
        Graph.machine.capturing = self

    def capture_end(self) -> None:
        Graph.machine.capturing = None
        if self.void:
            raise RuntimeError("CUDA error: operation failed due to a previous error")
        Graph.machine.driver.on_launch(self.handle, self.body or (lambda: None))

    def raw_cuda_graph(self) -> int:
        assert self.keep_graph
        return self.handle

    def replay(self) -> None:
        pass


class Generator:
    """Plays the generator of random numbers of a device."""

    def __init__(self) -> None:
        self.offset, self.states_set = 0, 0

    def clone_state(self) -> "Generator":
        return Generator()

    def graphsafe_set_state(self, state: "Generator") -> None:
        assert isinstance(state, Generator)
        self.states_set += 1


class Machine:
    """The process's two devices; `reset()` before a test."""

    def __init__(self) -> None:
        self.device, self.driver = TorchDevice(), Driver()
        self.capturing: Graph | None = None
        self.runs: list[tuple[int, bool]] = []
        self.generators = [Generator(), Generator()]
        Graph.machine = self
        _bridge.load_cuda_driver(str(self.driver.path))
        _bridge.set_graph_tools(
            lambda recording: _capture.capture(Spy(recording, self)), _capture.warn
        )
        side = SimpleNamespace(
            cuda_stream=SIDE_STREAM, synchronize=lambda: self.runs.append((SIDE_STREAM, False))
        )
        played = {
            "CUDAGraph": Graph,
            "Stream": lambda _: side,
            "current_stream": lambda _: side,
            "stream": lambda stream: self.device.stream(stream.cuda_stream),
            "device": lambda _: nullcontext(),
            "synchronize": lambda _: None,
            "graph_pool_handle": lambda: (0, 1),
            "default_generators": self.generators,
            "get_rng_state": lambda device: torch.tensor(self.generators[device.index].offset),
        }
        for name, value in played.items():
            setattr(torch.cuda, name, value)

    def reset(self) -> None:
        self.device.reset()
        self.driver.reset()
        self.runs.clear()
        self.capturing = None
        for generator in self.generators:
            generator.states_set = 0
        _capture._void.clear()

    def prepared(self, f: TorchModuleWrapper, *args: Any) -> "PreparedCall":
        return PreparedCall(f, args)

    def call(
        self, f: TorchModuleWrapper, *args: Any, ordinal: int = 0, stream: int = STREAM
    ) -> Any:
        """`f(*args)` on a device, as NumPy arrays."""
        return PreparedCall(f, args)(*args, ordinal=ordinal, stream=stream)


class PreparedCall:
    """The plan of a call, which lives as long as this does."""

    def __init__(self, f: TorchModuleWrapper, args: tuple[Any, ...]) -> None:
        leaves, treedef = jax.tree.flatten((args, {}), is_leaf=lambda x: x is None)
        prepared = f._prepare(args, {}, leaves, treedef)
        self.plan, self._structure = prepared.plan, prepared.structure

    def __call__(self, *args: Any, ordinal: int = 0, stream: int = STREAM) -> Any:
        operands = [
            np.ascontiguousarray(leaf)
            for leaf in jax.tree.leaves(args)
            if not torchcall._specs.is_static(leaf)
        ]
        before = [operand.copy() for operand in operands]
        outputs = [np.full(spec.shape, 77, spec.dtype) for spec in self.plan.outputs]
        self.plan._native.run_on_cuda(
            [operand.ctypes.data for operand in operands],
            [output.ctypes.data for output in outputs],
            ordinal,
            stream,
        )
        for operand, copy in zip(operands, before, strict=True):
            np.testing.assert_array_equal(operand, copy)
        return jax.tree.unflatten(self._structure, outputs)
