"""µs per step of replicas of argon on one CPU device, on two, and on one in each of two processes.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json

Velocity Verlet of 16 replicas of 64 atoms under a Lennard-Jones potential, at fixed edges, in a
jitted loop. `shard_map` divides the replicas among the devices, and `vmap` merges those of a
device into one call. torch has one thread in each call, and XLA one per device. Two processes form
one mesh by `jax.distributed`; each is bound to a core, as by the launchers of parallel programs.
Two unconnected processes, which each do all the work of one device, show what the machine's two
cores give: u = 2 × (one device) / (both unconnected). The methods are interleaved, in rounds of
0.3 s: a process that slept needs some steps to be as fast as before.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

# One thread per device: XLA's own operations must not borrow the other device's core.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false"
    f" --xla_force_host_platform_device_count={1 if '--child' in sys.argv else 2}"
)

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _harness import Report, Run, graph_of, liquid, parser, timed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import torchcall
from torchcall._command.included import load_example
from torchcall.mliap import AtomGraph, TorchMliap, energy_and_gradients

CUTOFF, REPLICAS, N_ATOMS = 8.5, 16, 64
STEP = 0.02  # of time, in Å (u/eV)^(1/2)
MASS = 39.948  # u
SPLIT, WHOLE = PartitionSpec("devices"), PartitionSpec()
ONE, TWO, PROCESSES = "one device", "two devices", "two processes"
UNCONNECTED = "one device in each of two unconnected processes"
ENGINES = ("TorchScript", "eager")
CHILD = "--child"


def potential(engine: str) -> TorchMliap:
    """Lennard-Jones argon with autograd inside."""
    module = load_example("lennard_jones").LennardJones(cutoff=CUTOFF, autograd=True).eval()
    scripted = torch.jit.script(module) if engine == "TorchScript" else module
    return TorchMliap.from_module(scripted, CUTOFF, threads=1)


def start() -> tuple[AtomGraph, np.ndarray]:
    """The replicas, stacked, and their velocities."""
    graph = graph_of(*liquid(N_ATOMS), CUTOFF, slack=1.0)
    stacked = jax.tree.map(lambda leaf: np.stack([np.asarray(leaf)] * REPLICAS), graph)
    generator = np.random.default_rng(0)
    return stacked, generator.normal(scale=0.01, size=(REPLICAS, N_ATOMS, 3)).astype(np.float32)


def steps(model: TorchMliap, mesh: Mesh) -> Callable[[int], Any]:
    """`run(calls)`: so many steps of dynamics on the devices of `mesh`; the final positions."""

    def forces(graph: AtomGraph, positions: jax.Array) -> jax.Array:
        moved = replace(graph, positions=positions)
        return -energy_and_gradients(model, moved).position_gradients

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(SPLIT, SPLIT, WHOLE), out_specs=SPLIT)
    def loop(graphs: AtomGraph, velocities: jax.Array, calls: jax.Array) -> jax.Array:
        def step(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            x, v, f = state
            v = v + 0.5 * STEP * f / MASS
            x = x + STEP * v
            f = jax.vmap(forces)(graphs, x)
            return x, v + 0.5 * STEP * f / MASS, f

        state = graphs.positions, velocities, jnp.zeros_like(velocities)
        return jax.lax.fori_loop(0, calls, step, state)[0]

    split, whole = NamedSharding(mesh, SPLIT), NamedSharding(mesh, WHOLE)

    def place(value: Any, sharding: NamedSharding) -> jax.Array:
        array = np.asarray(value)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    state = jax.tree.map(lambda leaf: place(leaf, split), start())
    return lambda calls: jax.block_until_ready(loop(*state, place(np.int32(calls), whole)))


def mesh_of(count: int) -> Mesh:
    """The first devices."""
    return Mesh(np.array(jax.devices()[:count]), ("devices",))


def child(port: str, rank: str, engine: str) -> None:
    """One of two processes: reads numbers of steps, and answers when they are done.

    Without a port it does all the work alone.
    """
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(rank) % len(cores)]})
    if port:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, int(rank), initialization_timeout=60)
    torchcall.set_num_threads(1)
    run = steps(potential(engine), mesh_of(2 if port else 1))
    for line in sys.stdin:
        run(int(line))
        print("done", flush=True)


class Processes:
    """Two processes, each with one device, of one mesh or unconnected."""

    def __init__(self, engine: str, *, connected: bool) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1]) if connected else ""
        self._pair = [
            subprocess.Popen(
                [sys.executable, __file__, CHILD, port, str(rank), engine],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]

    def __call__(self, calls: int) -> float:
        """Seconds for so many steps."""
        return timed(lambda: self._run(calls))

    def _run(self, calls: int) -> None:
        for process in self._pair:
            assert process.stdin is not None
            print(calls, file=process.stdin, flush=True)
        for process in self._pair:
            assert process.stdout is not None
            if process.stdout.readline() != "done\n":
                raise RuntimeError("torchcall: a process of the pair ended; its error is above")

    def close(self) -> None:
        """Ends both."""
        for process in self._pair:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._pair:
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def measure(report: Report, engine: str) -> None:
    """Times the three methods for one engine."""
    case = f"{REPLICAS} replicas of {N_ATOMS} atoms, {engine}"
    model = potential(engine)
    pairs = {
        PROCESSES: Processes(engine, connected=True),
        UNCONNECTED: Processes(engine, connected=False),
    }
    try:
        runs: dict[str, Run] = dict(pairs)
        results = []
        for name, count in {ONE: 1, TWO: 2}.items():
            run = steps(model, mesh_of(count))
            results.append(run(3))
            runs[name] = lambda calls, run=run: timed(lambda: run(calls))
        np.testing.assert_allclose(results[0], results[1], rtol=1e-5)
        for pair in pairs.values():
            pair(3)
        us = report.time(case, runs, engines=dict.fromkeys(runs, engine))
    finally:
        for pair in pairs.values():
            pair.close()
    if engine == "TorchScript":
        machine = 2 * us[ONE].us_median / us[UNCONNECTED].us_median
        report.claim(case, "u, of two unconnected processes", machine, 1.8, at_most=False)
        for name in (TWO, PROCESSES):
            ratio = us[ONE].us_median / us[name].us_median
            report.claim(case, f"one device / {name}", ratio, 1.8, at_most=False)
            report.claim(case, f"one device / {name}, of u", ratio / machine, 0.9, at_most=False)


def main(argv: list[str] | None = None) -> int:
    """Times both engines."""
    arguments = parser(__doc__ or "")
    arguments.set_defaults(rounds=25, seconds=0.3)
    options: argparse.Namespace = arguments.parse_args(argv)
    torchcall.set_num_threads(1)
    report = Report("Replicas on several devices", options)
    for engine in ENGINES:
        if options.only in engine:
            measure(report, engine)
    return report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        child(*sys.argv[2:])
        sys.exit()
    sys.exit(main())
