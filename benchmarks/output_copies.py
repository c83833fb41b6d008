"""Cost of copying a call's outputs, compared with the call: one large output, and potentials.

    python benchmarks/output_copies.py --json benchmarks/results/output_copies.json

µs per call in one jitted loop. The copy is measured separately, between two buffers of that size.
"""

import sys
from typing import Any

import jax.numpy as jnp
import torch
from _engines import call_loop
from _harness import (
    MEMCPY,
    TORCHCALL,
    Report,
    Run,
    graph_of,
    jitted_loop,
    liquid,
    memcpy_loop,
    parser,
)
from _potentials import potentials
from call_overhead import Double

import torchcall
from torchcall.mliap import TorchMliap, pad_graph


def large(elements: int) -> tuple[str, Run, int]:
    """`x * 2`: the output is as large as all the work."""
    wrapper = torchcall.TorchModuleWrapper(torch.jit.script(Double().eval()))
    x = jnp.zeros(elements, jnp.float32)
    run = jitted_loop(wrapper, (x,), lambda: wrapper.stats()["calls"])
    return f"x*2, {elements:.0e} float32", run, x.nbytes


def of_potential(name: str, module: Any, cutoff: float, n_atoms: int) -> tuple[str, Run, int]:
    """Energies and gradients of one liquid."""
    model = TorchMliap.from_module(
        torch.jit.script(module.eval()), cutoff, requires_grad=name != "Lennard-Jones"
    )
    graph, _ = pad_graph(graph_of(*liquid(n_atoms), cutoff, slack=1.0), cutoff=cutoff)
    n_bytes = sum(spec.size * spec.dtype.itemsize for spec in model.output_specs(graph).values())
    return f"{name}, {n_atoms} atoms", call_loop(model, graph), n_bytes


def main() -> int:
    """Measures, prints, and writes the file."""
    options = parser(__doc__ or "").parse_args()
    report = Report("Copies of outputs", options)
    found = [large(3_000_000)]
    for name, (module, cutoff) in potentials().items():
        if name != "Stillinger-Weber":
            found.append(of_potential(name, module, cutoff, 4096))
    for case, run, n_bytes in found:
        runs = {TORCHCALL: run, MEMCPY: memcpy_loop(n_bytes)}
        timings = report.time(f"{case}, {n_bytes} bytes out", runs)
        if "atoms" in case:
            share = timings[MEMCPY].us_median / timings[TORCHCALL].us_median
            report.claim(case, f"{MEMCPY} / {TORCHCALL}", share, 0.01)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
