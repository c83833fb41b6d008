"""The calls of the self-tests. Imports JAX and torch: needs a loaded torch half."""

import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch

from torchcall import _bridge
from torchcall._call.exported import export_checks
from torchcall._compile import compile
from torchcall._wrapper import TorchModuleWrapper, load


class Twice(torch.nn.Module):
    """Multiplies by two."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def twice(x: torch.Tensor) -> torch.Tensor:
    """Multiplies by two."""
    return x * 2


def torchscript(platform: str = "cpu") -> str:
    """Calls a scripted function. Returns what is worth knowing, or an empty string.

    Raises:
        Exception: It does not work.
    """
    wrapper = TorchModuleWrapper(torch.jit.script(twice))
    _check(wrapper, platform)
    if wrapper.stats()["weights"] != "shared":
        return "live modules are serialised: their C++ objects are inaccessible"
    return ""


def eager(platform: str = "cpu") -> str:
    """Calls a Python function, as `torchscript` does."""
    _check(TorchModuleWrapper(twice), platform)
    return ""


def has_cuda() -> bool:
    """Whether JAX and torch both have a CUDA device."""
    found = any(device.platform == "gpu" for device in jax.devices())
    return found and torch.version.cuda is not None and torch.cuda.is_available()


def cuda_driver() -> str:
    """Loads the CUDA driver as calls do.

    Raises:
        RuntimeError: It cannot be loaded.
    """
    _bridge.cuda_driver_loads()
    return ""


def package(path: Path) -> None:
    """Calls a package that `write_package` wrote."""
    _check(load(path), "cpu")


def write_package(path: Path) -> None:
    """Compiles a package. Takes about half a minute."""
    compile(Twice(), path, example=(torch.arange(6.0).reshape(2, 3),), cache=False)


def neighbor_list() -> str:
    """Counts the nearest neighbours in a periodic simple cubic lattice: six each."""
    from torchcall.mliap import neighbor_list as make

    axes = np.meshgrid(*[np.arange(3, dtype=np.float32)] * 3)
    positions = np.stack(axes, axis=-1).reshape(-1, 3)
    cell, pbc = 3 * np.eye(3, dtype=np.float32)[None], np.ones((1, 3), bool)
    with jax.default_device(_device("cpu")):
        found = make(1.1).allocate(positions, cell, pbc, np.zeros(27, np.int32))
    if int(found.n_edges) != 6 * 27:
        raise AssertionError(f"expected {6 * 27} pairs, got {int(found.n_edges)}")
    return ""


def export() -> str:
    """Exports a call of a TorchScript file, reads the export back and runs it."""
    with tempfile.TemporaryDirectory(prefix="torchcall-doctor-") as folder:
        path = Path(folder) / "twice.pt"
        torch.jit.script(Twice()).save(str(path))
        x = _example()
        with jax.default_device(_device("cpu")):
            program = jax.jit(load(path))
            exported = jax.export.export(program, disabled_checks=export_checks())(x)
            _compare(jax.export.deserialize(exported.serialize()).call(x))
    return ""


def _device(platform: str) -> Any:
    try:
        return jax.devices(platform)[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the platform out
        return jax.devices()[0]


def _example() -> np.ndarray:
    return np.arange(6, dtype=np.float32).reshape(2, 3)


def _check(wrapper: Any, platform: str) -> None:
    with jax.default_device(_device(platform)):
        for _ in range(3):  # on CUDA, the third call replays a CUDA graph
            _compare(jax.jit(wrapper)(_example()))


def _compare(got: Any) -> None:
    if not np.array_equal(got, 2 * _example()):
        raise AssertionError(
            f"expected {(2 * _example()).tolist()}, got {np.asarray(got).tolist()}"
        )
