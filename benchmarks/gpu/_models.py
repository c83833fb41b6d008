"""A potential through each engine: as torch runs it alone, and as torchcall does."""

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import Device, graph_at, neighbors_of

from torchcall import mliap
from torchcall.mliap import AtomGraphInput, TorchMliap, pad_graph

SCRIPT, PACKAGE, EAGER = "TorchScript", "AOTInductor", "eager"
ENGINES = (SCRIPT, PACKAGE, EAGER)


class Engines:
    """One module on a device, through the engines that can run it.

    Args:
        name: Of the module.
        module: It is copied to the device.
        cutoff: In Å.
        device: Where to run.
        package: Its AOTInductor package, if there is one.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        cutoff: float,
        device: Device,
        package: Path | None,
    ) -> None:
        self.name, self.cutoff, self.package = name, cutoff, package
        self.module = copy.deepcopy(module).to(device.of_torch)
        self.script = torch.jit.script(self.module)
        self.forwards: dict[str, Callable[..., Any]] = {
            SCRIPT: self.script.forward,
            EAGER: self.module.forward,
        }
        if package is not None:
            load: Any = torch._inductor.aoti_load_package
            loaded = load(str(package), run_single_threaded=True)
            # torch's loader takes a dict's entries in the order in which they come.
            keys = list(AtomGraphInput.__annotations__)
            self.forwards[PACKAGE] = lambda graph: loaded({key: graph[key] for key in keys})

    def model(self, engine: str, *, cuda_graph: str) -> TorchMliap:
        """The potential through torchcall."""
        if engine == PACKAGE:
            assert self.package is not None
            return TorchMliap.from_package(self.package, cuda_graph=cuda_graph)
        module = self.script if engine == SCRIPT else self.module
        return TorchMliap.from_module(module, self.cutoff, cuda_graph=cuda_graph)


def package_of(name: str, module: torch.nn.Module, cutoff: float, device: Device) -> Path:
    """Compiles a package for any shapes; torchcall's cache keeps it for the next run.

    Raises:
        RuntimeError: It cannot be compiled.
    """
    folder = Path(__file__).parents[2] / "build" / "gpu-packages"
    folder.mkdir(parents=True, exist_ok=True)
    neighbors = neighbors_of(64, cutoff)
    example, _ = pad_graph(graph_at(neighbors.positions, neighbors.cell, neighbors), cutoff=cutoff)
    path = folder / f"{name.replace(' ', '-')}-{device.of_torch.type}.pt2"
    return mliap.compile(
        module, path, example=example, cutoff=cutoff, device=device.of_torch.type, dynamic=True
    )


def engines_of(
    potentials: dict[str, tuple[torch.nn.Module, float]],
    options: argparse.Namespace,
    device: Device,
    leave_out: Callable[[str, str, str], None],
) -> list[Engines]:
    """Every potential that the options want, through the engines that they want."""
    result = []
    for name, (module, cutoff) in potentials.items():
        if name not in options.potentials:
            continue
        package = None
        if PACKAGE in options.engines:
            begun = time.monotonic()
            try:
                package = package_of(name, module, cutoff, device)
                print(f"{name}: package after {time.monotonic() - begun:.0f} s", flush=True)
            except (RuntimeError, OSError, ValueError, TypeError) as error:
                leave_out(name, PACKAGE, str(error))
        result.append(Engines(name, module, cutoff, device, package))
    return result
