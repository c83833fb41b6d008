"""Reports versions and devices, and tests each engine."""

import os
import platform as machine
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jaxlib.version
import numpy as np
import torch

from torchcall import _bridge, _native


def _twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def _self_test(model: Callable[..., torch.Tensor], platform: str = "cpu") -> str:
    from torchcall._wrapper import TorchModuleWrapper

    wrapper = TorchModuleWrapper(model)
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with jax.default_device(jax.devices(platform)[0]):
        # On CUDA, the third call replays a CUDA graph.
        got = [np.asarray(jax.jit(wrapper)(x)) for _ in range(3)][-1]
    if not np.array_equal(got, 2 * x):
        return f"FAILED: expected {(2 * x).tolist()}, got {got.tolist()}"
    if wrapper.stats()["weights"] != "shared":
        return "ok, but live modules are serialised: their C++ objects are inaccessible"
    return "ok"


def _compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"packages run; compiling them needs a C++ compiler ({compiler} not found)"
    return f"packages run; they are compiled with {shutil.which(compiler)}"


def _cuda() -> str:
    jax_has = any(device.platform == "gpu" for device in jax.devices())
    if torch.version.cuda is None:
        return "torch was built without CUDA; programs run on the CPU"
    if not torch.cuda.is_available():
        return f"torch has CUDA {torch.version.cuda} but no device; programs run on the CPU"
    if not jax_has:
        return "torch has a device, JAX has none (jax[cuda13]?); programs run on the CPU"
    _bridge.cuda_driver_loads()
    outcomes = [_self_test(model, "gpu") for model in (torch.jit.script(_twice), _twice)]
    return f"CUDA {torch.version.cuda}; TorchScript {outcomes[0]}, eager {outcomes[1]}"


def _attempt(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"


def doctor() -> dict[str, str]:
    """Checks the installation and prints a report.

    Returns:
        The report, one entry per line: versions, the torch half in use, devices, threads, and the
        result of a test call per engine ("ok", or the failure). Never raises.
    """
    from torchcall import __version__

    half = os.environ.get("TORCHCALL_TORCH_HALF") or _attempt(
        lambda: str(_native.find_torch_half(torch.__version__, _native.library_root()))
    )
    report = {
        "torchcall": f"{__version__} ({Path(__file__).parent})",
        "python": f"{machine.python_version()} ({sys.executable})",
        "platform": f"{machine.system()} {machine.machine()}, {os.cpu_count()} cores",
        "jax, jaxlib": f"{jax.__version__}, {jaxlib.version.__version__}",
        "torch": str(torch.__version__),
        "torch half": f"{half} (built for torch {_attempt(_bridge.torch_half_version)})",
        "jax devices": _attempt(lambda: ", ".join(map(str, jax.devices()))),
        "torch threads per call": str(torch.get_num_threads()),
        "TorchScript on the CPU": _attempt(lambda: _self_test(torch.jit.script(_twice))),
        "eager on the CPU": _attempt(lambda: _self_test(_twice)),
        "AOTInductor on the CPU": _compiler(),
        "CUDA": _attempt(_cuda),
    }
    width = max(map(len, report))
    for name, value in report.items():
        print(f"{name:<{width}}  {value}")
    return report
