"""µs per call with 1, 2, 4, … torch threads, and with the number that `threads="auto"` chose.

    python benchmarks/threads.py --json benchmarks/results/threads.json

Lennard-Jones argon with autograd inside, as TorchScript and as a package with parallel code. First
one call at a time in a jitted loop, then one loop on each of two XLA devices at once: each device
has its own team of torch threads. The methods are interleaved.
"""

import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
)

import jax
import jax.numpy as jnp
import torch
from _harness import Report, Run, graph_of, jitted_loop, liquid, parser, timed

from torchcall import mliap
from torchcall._command.included import load_example
from torchcall.mliap import AtomGraph, TorchMliap, energy_and_gradients

CUTOFF = 8.5
AUTO = 'threads="auto"'
SIZES = {"64 atoms": 64, "4096 atoms": 4096}


def numbers() -> list[int]:
    """1, 2, 4, … up to torch's number of threads."""
    return [1 << k for k in range(torch.get_num_threads().bit_length())]


def models(engine: str, graph: AtomGraph, folder: Path) -> dict[str, TorchMliap]:
    """The potential with each number of threads, and with the one that warm-up chooses."""
    module = load_example("lennard_jones").LennardJones(cutoff=CUTOFF, autograd=True).eval()
    if engine == "AOTInductor":
        path = folder / "argon.pt2"
        if not path.exists():
            mliap.compile(module, path, example=graph, cutoff=CUTOFF, dynamic=True, parallel=True)
        wrap = partial(TorchMliap.from_package, path)
    else:
        wrap = partial(TorchMliap.from_module, torch.jit.script(module), CUTOFF)
    options: dict[str, Any] = {f"threads={n}": n for n in numbers()} | {AUTO: "auto"}
    return {name: wrap(threads=threads) for name, threads in options.items()}


def loop(model: TorchMliap, graph: AtomGraph) -> Run:
    """Energies and gradients in one jitted loop."""
    return jitted_loop(
        lambda graph: energy_and_gradients(model, graph),
        (graph,),
        lambda: model.wrapper.stats()["calls"],
    )


def replicas(model: TorchMliap, graph: AtomGraph) -> Run:
    """The same loop on two devices at once, from a Python thread each: seconds per call of each.

    From one thread, JAX would run programs that it takes for cheap one after the other.
    """
    copies = [jax.device_put(graph, device) for device in jax.devices()[:2]]

    @jax.jit
    def steps(graph: AtomGraph, calls: jax.Array) -> jax.Array:
        def body(_: jax.Array, total: jax.Array) -> jax.Array:
            moved, total = jax.lax.optimization_barrier((graph, total))
            return 0 * total + energy_and_gradients(model, moved).energy[0]

        return jax.lax.fori_loop(0, calls, body, jnp.float32(0))

    pool = ThreadPoolExecutor(len(copies))

    def one(copy: AtomGraph, calls: int) -> None:
        jax.block_until_ready(steps(copy, calls))

    def run(calls: int) -> float:
        return timed(lambda: list(pool.map(one, copies, [calls] * len(copies))))

    run(2)
    return run


def main(argv: list[str] | None = None) -> int:
    """Times each engine and size."""
    options = parser(__doc__ or "").parse_args(argv)
    report = Report("Numbers of torch threads", options)
    with tempfile.TemporaryDirectory() as folder:
        for size, n_atoms in SIZES.items():
            if options.quick and n_atoms > 64:
                continue
            graph = graph_of(*liquid(n_atoms), CUTOFF, slack=1.0)
            for engine in ("TorchScript", "AOTInductor"):
                case = f"{engine}, {size}"
                if options.only in case:
                    measure(report, case, engine, models(engine, graph, Path(folder)), graph)
    return report.finish()


def measure(
    report: Report, case: str, engine: str, made: dict[str, TorchMliap], graph: AtomGraph
) -> None:
    """One call at a time, then two at once."""
    auto = made[AUTO]
    seconds = timed(lambda: auto.warmup(graph))
    (found,) = auto.wrapper.stats()["measured_threads"]
    report.found[case] = {"auto": found["threads"]}
    runs = {name: loop(model, graph) for name, model in made.items()}
    report.time(case, runs, engines=dict.fromkeys(runs, engine))
    print(f"  auto chose {found['threads']} from {found['us']} µs; warm-up: {seconds:.2f} s")
    runs = {name: replicas(model, graph) for name, model in made.items()}
    report.time(f"{case}, on two devices at once", runs, engines=dict.fromkeys(runs, engine))


if __name__ == "__main__":
    sys.exit(main())
