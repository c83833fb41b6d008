"""Two simulated CUDA devices, and calls on them as XLA's handler makes them.

Real: call plans, both native halves, torch's interpreter and autograd, replays, `_cuda.capture`.
Simulated: the driver, torch's devices, torch's capture API.
"""

from typing import Any

import jax
import numpy as np
import torch
from standin.driver import Driver
from standin.torch_device import TorchDevice
from standin.torch_graphs import simulated_cuda

import torchcall
from torchcall import TorchModuleWrapper, _bridge
from torchcall._call.call import CallOptions
from torchcall._cuda import capture as _capture

STREAM, OTHER_STREAM = 0x7F00, 0x7F10


class Machine:
    """The process's two devices; `reset()` before a test."""

    def __init__(self) -> None:
        self.device, self.driver = TorchDevice(), Driver()
        _bridge.load_cuda_driver(str(self.driver.path))
        _bridge.set_graph_tools(_capture.capture, _capture.warn)
        self._simulation = simulated_cuda(self.device, self.driver)
        self._simulation.__enter__()  # until the process exits
        self.generators: Any = torch.cuda.default_generators

    def reset(self) -> None:
        self.device.reset()
        self.driver.reset()
        for generator in self.generators:
            generator.states_set = 0
        _capture._invalidated.clear()

    def prepared(
        self, f: TorchModuleWrapper, *args: Any, options: CallOptions | None = None
    ) -> "PreparedCall":
        return PreparedCall(f, args, options)

    def call(
        self, f: TorchModuleWrapper, *args: Any, ordinal: int = 0, stream: int = STREAM
    ) -> Any:
        """`f(*args)` on a device, as NumPy arrays."""
        return PreparedCall(f, args, None)(*args, ordinal=ordinal, stream=stream)


class PreparedCall:
    """A call with its plan, which it retains."""

    def __init__(
        self, f: TorchModuleWrapper, args: tuple[Any, ...], options: CallOptions | None
    ) -> None:
        leaves, treedef = jax.tree.flatten((args, {}), is_leaf=lambda x: x is None)
        prepared = f._prepare(leaves, treedef, options or CallOptions())
        self.plan, self._structure = prepared.plan, prepared.structure

    def __call__(
        self, *args: Any, ordinal: int = 0, stream: int = STREAM, lengths: tuple[Any, ...] = ()
    ) -> Any:
        operands = [
            np.ascontiguousarray(leaf)
            for leaf in (*jax.tree.leaves(args), *lengths)
            if not torchcall._call.specs.is_static(leaf)
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
