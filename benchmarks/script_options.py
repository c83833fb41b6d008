"""Effect of TorchScript's options on potentials: freezing, optimising, torch's executors.

    python benchmarks/script_options.py --json benchmarks/results/script_options.json

µs per call: through torchcall in one jitted loop, the profiling executor in a C++ loop. torchcall
runs the graph with torch's interpreter. `Module::forward` uses the profiling executor, which
specialises on the first calls and, with the fuser on, also compiles on the CPU. Fusion is a setting
of the whole process, so those rows come last.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from _engines import potentials
from _harness import Report, Run, graph_of, jitted_loop, liquid, parser, tensors_of
from _native_loop import script_loop
from torch.jit import set_fusion_strategy  # pyright: ignore[reportPrivateImportUsage]

from torchcall.mliap import AtomGraphInput, TorchMliap, pad_graph

PLAIN, FROZEN, OPTIMISED = "as it is", "freeze=True", "optimize_for_inference"
PROFILING = "profiling executor, C++ loop"


def main() -> int:
    """Measures, prints, and writes the file."""
    options = parser(__doc__ or "").parse_args()
    report = Report("TorchScript's options", options)
    for name, (module, cutoff) in potentials().items():
        if options.only in name:
            graph, _ = pad_graph(graph_of(*liquid(64), cutoff, slack=1.0), cutoff=cutoff)
            measure(report, name, module, cutoff, graph)
    return report.finish()


def measure(
    report: Report, name: str, module: torch.nn.Module, cutoff: float, graph: AtomGraphInput
) -> None:
    """One potential's rows."""
    script = torch.jit.script(module)
    gradients = name != "Lennard-Jones by formulas"

    def model(script: Any, **options: Any) -> TorchMliap:
        return TorchMliap.from_module(script, cutoff, requires_grad=gradients, **options)

    def in_cpp(script: Any) -> Run:
        return script_loop(script, (tensors_of(graph),), requires_grad=gradients)

    runs: dict[str, Run] = {}
    attempt(runs, PLAIN, lambda: in_jax(model(script), graph))
    attempt(runs, FROZEN, lambda: in_jax(model(script, freeze=True), graph))
    attempt(runs, OPTIMISED, lambda: in_jax(model(optimised(script)), graph))
    attempt(runs, PROFILING, lambda: in_cpp(script))
    report.time(f"{name}, 64 atoms", runs)

    fuses = torch._C._jit_can_fuse_on_cpu()
    torch._C._jit_override_can_fuse_on_cpu(True)
    before = set_fusion_strategy([("STATIC", 2), ("DYNAMIC", 10)])
    again = torch.jit.script(module)
    runs = {}
    attempt(runs, PLAIN, lambda: in_jax(model(again), graph))
    attempt(runs, PROFILING, lambda: in_cpp(again))
    report.time(f"{name}, 64 atoms, fused on the CPU", runs)
    set_fusion_strategy(before)
    torch._C._jit_override_can_fuse_on_cpu(fuses)


def attempt(runs: dict[str, Run], method: str, make: Callable[[], Run]) -> None:
    """Adds a method, or prints why it cannot run."""
    try:
        run = make()
        run(30)
        runs[method] = run
    except Exception as error:  # from torch's optimisers: leave out the row and go on
        reason = str(error).strip().splitlines() or [type(error).__name__]
        print(f"{method} is left out: {reason[0]}")


def optimised(script: Any) -> Any:
    """A copy after torch's own passes for inference."""
    return torch.jit.optimize_for_inference(torch.jit.freeze(script.eval()))


def in_jax(model: TorchMliap, graph: AtomGraphInput) -> Run:
    """The call in one jitted loop."""
    return jitted_loop(model.call, (graph,), lambda: model.wrapper.stats()["calls"])


if __name__ == "__main__":
    sys.exit(main())
