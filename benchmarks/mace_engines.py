"""MACE through torch's three engines: eager modules, TorchScript, AOTInductor packages.

A random ScaleShiftMACE (2 layers, 32x0e + 32x1o) on 64 silicon atoms in float32: energy, position
gradients and cell gradients in one call, from torch's own Python loop and through torchcall in one
jitted loop. torch has one thread unless --threads says otherwise, and the package is compiled for
as many. Needs mace-torch.
"""

# pyright: reportMissingImports=false
# mace-torch is optional.

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _engines import call_loop
from _harness import FLOOR, Report, parser, python_loop, tensors_of
from _native_loop import package_loop, script_loop
from script_options import OPTIMISED, PROFILING, attempt, optimised

import torchcall
from torchcall import mliap
from torchcall._command.included import load_example
from torchcall.demo._timing import Run
from torchcall.mliap import TorchMliap, pad_graph

EAGER, SCRIPTED, PACKAGE = "eager", "TorchScript", "AOTInductor"
PACKAGE_FLOOR = f"{FLOOR}, {PACKAGE}"
FROZEN = f"torchcall, {SCRIPTED}, freeze=True"
TUNED, PROFILED = f"torchcall, {SCRIPTED}, {OPTIMISED}", f"{SCRIPTED}, {PROFILING}"


def methods(repeat: int, folder: Path) -> tuple[str, dict[str, Run]]:
    """The case's name and a loop for each engine, compiled and warm."""
    example = load_example("mace_adapter")
    graph = example.silicon(repeat)
    padded, _ = pad_graph(graph, cutoff=5.0)
    tensors = tensors_of(padded)
    eager = mliap.with_gradients(example.MaceEnergy(example.random_mace(for_compile=False)).eval())
    path = mliap.compile(example.random_silicon(), folder / "mace.pt2", example=graph, cutoff=5.0)
    package = torch._inductor.aoti_load_package(str(path))
    expected = eager(tensors)
    for key, value in package(tensors).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4)

    from e3nn.util import jit

    scripted = jit.script(eager)
    runs = {
        EAGER: python_loop(eager, (tensors,), requires_grad=True),
        SCRIPTED: python_loop(scripted, (tensors,), requires_grad=True),
        PACKAGE: python_loop(_Forward(package), (tensors,), requires_grad=False),
    }

    def model(module: Any, **options: Any) -> TorchMliap:
        return TorchMliap.from_module(module, 5.0, True, **options)

    compiled = TorchMliap.from_package(path)
    runs[f"torchcall, {EAGER}"] = call_loop(model(eager), padded)
    runs[f"torchcall, {SCRIPTED}"] = call_loop(model(scripted), padded)
    runs[FROZEN] = call_loop(model(scripted, freeze=True), padded)
    attempt(runs, TUNED, lambda: call_loop(model(optimised(scripted)), padded))
    attempt(runs, PROFILED, lambda: script_loop(scripted, (tensors,), requires_grad=True))
    runs[f"torchcall, {PACKAGE}"] = call_loop(compiled, padded)
    runs[PACKAGE_FLOOR] = package_loop(path, (tensors,))
    for run in runs.values():
        run(5)
    shape = f"{len(graph.positions)} atoms, {tensors['edge_index'].shape[1]} edges"
    return f"ScaleShiftMACE, {shape}, threads: {torch.get_num_threads()}", runs


class _Forward:
    """A package under the name that loops call."""

    def __init__(self, package: object) -> None:
        self.forward = package


def main() -> int:
    """Measures, prints, and writes the file."""
    arguments = parser(__doc__ or "")
    arguments.add_argument("--repeat", type=int, default=2, help="8 n³ atoms (default: 2, 64)")
    arguments.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torchcall.set_num_threads(options.threads)
    try:
        import mace  # noqa: F401
    except ImportError:
        print("torchcall: mace-torch is missing: pip install -r requirements/mace.txt --no-deps")
        return 2
    report = Report("MACE through torch's engines", options)
    with tempfile.TemporaryDirectory() as folder:
        case, runs = methods(options.repeat, Path(folder))
        engines = {
            name: next(engine for engine in (EAGER, SCRIPTED, PACKAGE) if engine in name)
            for name in runs
        }
        timings = report.time(case, runs, engines=engines)
    for method, limit in ((EAGER, 1.5), (SCRIPTED, 1.3)):
        ratio = timings[method].us_median / timings[PACKAGE].us_median
        report.claim(case, f"{method} / {PACKAGE}", ratio, limit, at_most=False)
        ours = f"torchcall, {method}", f"torchcall, {PACKAGE}"
        ratio = timings[ours[0]].us_median / timings[ours[1]].us_median
        report.claim(case, " / ".join(ours), ratio, limit, at_most=False)
    share = 1 - timings[PACKAGE_FLOOR].us_median / timings[f"torchcall, {PACKAGE}"].us_median
    report.claim(case, "the bridge's share of a call", share, 0.02)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
