"""Time of making a package, through torch's own path and through torchcall's.

Each row is one process with empty caches. It reports processor seconds, those of the C++ compiler
among them, and seconds by the clock. Processor seconds grow with the load too, if less. Run it in
the environment of the network:

    .venv-mace/bin/python benchmarks/compile_time.py mace-16 mace-32
    python benchmarks/compile_time.py lennard-jones --method torchcall
"""

# pyright: reportMissingImports=false
# The networks are optional.

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

MACE = {
    "mace-16": "16x0e + 16x1o",
    "mace-32": "32x0e + 32x1o",
    "mace-128": "128x0e + 128x1o",
}
CASES = ("lennard-jones", *MACE, "7net-0", "chgnet", "nequip")
METHODS = ("torch", "torchcall")


def module_of(case: str) -> Any:
    """The module of energies that is compiled."""
    import torch

    from torchcall.mliap import edge_vectors
    from torchcall.models import _common

    if case == "lennard-jones":

        class LennardJones(torch.nn.Module):
            cutoff = 8.5

            def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
                power = (3.4**2 / edge_vectors(input).square().sum(1)) ** 3
                pairs = 2 * 0.0104 * (power * power - power)
                system = input["batch"].index_select(0, input["edge_index"][0])
                total = torch.zeros(input["cell"].size(0), dtype=pairs.dtype)
                return total.index_add(0, system, pairs)

        return LennardJones()
    from torchcall._command.included import load_example

    found: list[Any] = []  # what the network passes to the last step of loading
    own = _common.build
    _common.build = lambda module, **_: found.append(module)  # type: ignore[assignment]
    try:
        if case in MACE:
            from torchcall.models import mace

            with mace._imports():
                model = load_example("mace_adapter").random_mace(
                    for_compile=False, hidden=MACE[case]
                )
            mace.load(model.float(), engine="package", device="cpu")
        elif case == "nequip":
            from _networks import NETWORKS

            from torchcall.models import nequip

            nequip.load(NETWORKS["nequip"]().source, engine="package", device="cpu")
        else:
            from torchcall import models

            network = models.sevennet if case == "7net-0" else models.chgnet
            network.load(case, engine="package", device="cpu")
    finally:
        _common.build = own
    return found[0]


def torchs_own(folder: Path, module: Any) -> None:
    """Tracing, export and compilation with torch's defaults."""
    import torch
    from torch._inductor import aoti_compile_and_package
    from torch.export import Dim, export

    from torchcall.mliap._compile import _trace
    from torchcall.mliap._compile._form import INPUTS, MINIMUM
    from torchcall.mliap._compile._gradients import PotentialModule
    from torchcall.mliap._compile._run import _of_distinct_sizes
    from torchcall.mliap._compile._small import small_example
    from torchcall.mliap._species import species_of

    _trace.simplify = lambda _: None  # type: ignore[assignment]
    potential = PotentialModule(module, None, torch.device("cpu"))
    graph = small_example(float(module.cutoff), species_of(module), torch.float32)
    potential.inspect(graph)
    graph = _of_distinct_sizes(graph)
    flat = _trace.trace(potential, graph, dynamic=True).module

    class OfDict(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = flat

        def forward(self, input: dict[str, torch.Tensor]) -> Any:
            return self.flat(*[input[key] for key in INPUTS])

    dims = {axis: Dim(axis, min=least) for axis, least in MINIMUM.items()}
    shapes = {
        key: {i: dims[n] for i, n in enumerate(form) if isinstance(n, str)}
        for key, form in INPUTS.items()
    }
    program = export(OfDict(), (dict(graph),), dynamic_shapes=(shapes,))
    aoti_compile_and_package(program, package_path=str(folder / "torch.pt2"))


def torchcalls(folder: Path, module: Any) -> None:
    """`TorchMliap.from_energy(module, engine="package")`, with its checks."""
    del folder
    from torchcall.mliap import TorchMliap

    TorchMliap.from_energy(module, engine="package")


def child(case: str, method: str, packages: str) -> None:
    """Compiles once and prints a line of JSON."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{name}/inductor"
        os.environ["TORCHCALL_CACHE"] = packages or f"{name}/packages"
        module = module_of(case)
        if case == "7net-0":
            from torchcall.models import sevennet

            stack.enter_context(sevennet._traceable())
        start, before = time.perf_counter(), _seconds()
        (torchs_own if method == "torch" else torchcalls)(Path(name), module)
        wall = time.perf_counter() - start
        python, compiler = (b - a for a, b in zip(before, _seconds(), strict=True))
    print(json.dumps({"python": python, "compiler": compiler, "wall": wall}))


def _seconds() -> tuple[float, float]:
    """Processor seconds of this process and of its children."""
    both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    own, children = (usage.ru_utime + usage.ru_stime for usage in both)
    return own, children


def main() -> int:
    """Measures and prints one line per case and method."""
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("case", nargs="+", choices=CASES)
    arguments.add_argument("--method", nargs="+", choices=METHODS, default=METHODS)
    arguments.add_argument("--packages", default="", help="an empty folder in which they are kept")
    arguments.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = arguments.parse_args()
    if options.child:
        child(options.case[0], options.method[0], options.packages)
        return 0
    print(f"{'processor s':>33}{'of it C++':>11}{'clock s':>9}{'load':>6}")
    for case in options.case:
        for method in options.method:
            command = [sys.executable, __file__, case, "--method", method, "--child"]
            command += ["--packages", options.packages]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(run.stdout.splitlines()[-1])
            total = row["python"] + row["compiler"]
            print(
                f"{case:<14}{method:<10}{total:>9.1f}{row['compiler']:>11.1f}{row['wall']:>9.1f}"
                f"{os.getloadavg()[0]:>6.1f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
