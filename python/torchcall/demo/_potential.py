"""The demo's model: the included Lennard-Jones argon, or the user's TorchScript file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import torch

import torchcall
from torchcall.demo._system import DemoError, load_example
from torchcall.mliap._input import AtomGraphInput, input_dtypes, output_specs


@dataclass
class Outputs:
    """Specs of a model's outputs: energies, gradients, and any others it returns."""

    others: dict[str, jax.ShapeDtypeStruct] = field(default_factory=dict)

    def __call__(self, graph: AtomGraphInput) -> dict[str, jax.ShapeDtypeStruct]:
        return output_specs(graph) | self.others


@dataclass(frozen=True)
class LoadedPotential:
    """A model. torchcall calls `wrapper`, the peers call `module`."""

    name: str
    wrapper: torchcall.TorchModuleWrapper
    module: Any
    outputs: Outputs
    requires_grad: bool

    def warmup(self, graph: AtomGraphInput) -> str:
        """Calls the model on real data, and describes the number of torch threads chosen for it."""
        self.wrapper.warmup(graph)
        found = self.wrapper.stats()["measured_threads"]
        us = found[-1]["us"] if found else {}
        times = ", ".join(f"{number}: {time:.0f} µs" for number, time in us.items())
        return f"{self.threads} ({times})" if len(us) > 1 else str(self.threads)

    @property
    def threads(self) -> int:
        """The number of torch threads in calls of these shapes; on a GPU it is torch's own."""
        found = self.wrapper.stats()["measured_threads"]
        return found[-1]["threads"] if found else torch.get_num_threads()

    def learn_outputs(self, graph: AtomGraphInput) -> None:
        """Calls the module once from Python to find its additional outputs.

        Args:
            graph: Real data.

        Raises:
            DemoError: If the module raises, or a required output is missing.
        """
        casts = input_dtypes()
        tensors = {k: torch.from_dlpack(v).to(casts[k], copy=True) for k, v in graph.items()}
        try:
            with torch.enable_grad() if self.requires_grad else torch.no_grad():
                result = self.module(tensors)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = lines[-1].strip() if lines else type(error).__name__
            raise DemoError(f"{self.name}: the model failed: {reason}") from error
        expected = output_specs(graph)
        found = sorted(result) if isinstance(result, dict) else type(result).__name__
        if not isinstance(result, dict) or not expected.keys() <= result.keys():
            raise DemoError(
                f"{self.name}: expected a dict with {' and '.join(expected)}, got {found}"
            )
        for key, value in result.items():
            if key not in expected:
                dtype = str(value.dtype).removeprefix("torch.")
                self.outputs.others[key] = jax.ShapeDtypeStruct(tuple(value.shape), dtype)


def load_potential(path: Path | None, cutoff: float) -> LoadedPotential:
    """Loads a model from a file, or the included Lennard-Jones argon.

    Models from files run with `requires_grad=True`, as most learned potentials differentiate
    internally.

    Args:
        path: A TorchScript archive, or None.
        cutoff: Of the included model, in Å.

    Raises:
        DemoError: If there is no such file. Errors of `torchcall.load` are not caught.
    """
    outputs = Outputs()
    spec: dict[str, Any] = {
        "input_spec": ((input_dtypes(),), {}),
        "output_spec": outputs,
        "threads": "auto",
    }
    if path is None:
        with quiet_torchscript():
            argon = load_example("lennard_jones").LennardJones(cutoff=cutoff).eval()
            module = torch.jit.script(argon)
        wrapper = torchcall.TorchModuleWrapper(module, **spec)
        return LoadedPotential("Lennard-Jones argon", wrapper, module, outputs, requires_grad=False)
    if not path.is_file():
        raise DemoError(f"--model {path}: {'not a file' if path.exists() else 'no such file'}")
    wrapper = torchcall.load(path, requires_grad=True, **spec)
    with quiet_torchscript():
        module = torch.jit.load(path, map_location="cpu")
    return LoadedPotential(path.name, wrapper, module, outputs, requires_grad=True)


@contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Silences torch's deprecation warnings for TorchScript, the format of deployed models."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        yield
