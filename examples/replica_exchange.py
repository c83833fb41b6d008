"""Replica-exchange molecular dynamics of an argon cluster, with replicas on several devices.

    python examples/replica_exchange.py                  # one process, two virtual CPU devices
    python examples/replica_exchange.py --processes 2    # two processes, one device each

Each of R replicas of 13 atoms moves by Langevin dynamics (BAOAB: B. Leimkuhler and C. Matthews,
J. Chem. Phys. 138, 174102 (2013)) at one of R temperatures. After some steps, neighbours i and j in
the order of temperatures exchange their temperatures with the probability

    min(1, exp((β_i − β_j) (E_i − E_j))),   β = 1/kT, E: potential energy,

and velocities are scaled by √(T_new/T_old), so that positions and velocities of each temperature
stay distributed as exp(−β H) (Y. Sugita and Y. Okamoto, Chem. Phys. Lett. 314, 141 (1999)).

`shard_map` divides the replicas among the devices of one or several processes; each device calls
the torch potential once per step, for all of its replicas. Energies are gathered inside the jitted
loop, and every device takes the same decisions from the same random numbers. So the trajectory does
not depend on the number of processes, to the last bit.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = 2
N_ATOMS = 13
MASS = 39.948  # u
BOLTZMANN = 8.617333e-5  # eV/K
FEMTOSECOND = 0.09822695  # Å (u/eV)^(1/2)
CUTOFF = 12.0  # Å
TIMEOUT = 600  # s, of each process

Array = Any


class Replicas(NamedTuple):
    """The replicas of one device: Å, Å/time, eV/Å, eV, and the rung of each on the ladder."""

    positions: Array
    velocities: Array
    forces: Array
    energies: Array
    rungs: Array


class Record(NamedTuple):
    """After each round of steps, by rung: potential energy in eV, temperature in K, exchanges.

    `accepted` and `tried` are those of each rung with the next one.
    """

    energies: Array
    kinetic: Array
    accepted: Array
    tried: Array


def cluster() -> Any:
    """An icosahedron of 13 atoms, 3.82 Å apart."""
    import numpy as np

    golden = (1 + 5**0.5) / 2
    corners = [(0, a, b * golden) for a in (-1, 1) for b in (-1, 1)]
    shell = np.array([np.roll(corner, k) for corner in corners for k in range(3)])
    return 1.91 * np.concatenate([np.zeros((1, 3)), shell])


def simulate(mesh: Any, temperatures: Sequence[float], rounds: int, steps: int, seed: int) -> Any:
    """Runs the simulation on the devices of `mesh`.

    Args:
        mesh: with the axis "replicas", which divides the number of temperatures.
        temperatures: in K, ascending.
        rounds: the number of attempts to exchange.
        steps: of 5 fs, before each of them.
        seed: of all random numbers.

    Returns:
        The record of all rounds, and the final positions of all replicas.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from lennard_jones import LennardJones

    from torchcall.mliap import AtomGraph, TorchMliap, energy_and_gradients

    spec = jax.sharding.PartitionSpec
    ladder = jnp.asarray(temperatures, jnp.float32)
    n, parts = len(temperatures), mesh.shape["replicas"]
    own = n // parts
    module = LennardJones(cutoff=CUTOFF, onset=CUTOFF - 2).eval()
    model = TorchMliap.from_module(torch.jit.script(module), CUTOFF, threads=1)
    # All pairs: beyond the cutoff, energies and forces are zero.
    pairs = np.stack(np.nonzero(~np.eye(N_ATOMS, dtype=bool))).astype(np.int32)
    graph = AtomGraph(
        positions=jnp.asarray(cluster(), jnp.float32),
        atomic_numbers=jnp.full(N_ATOMS, 18, jnp.int32),
        cell=100 * jnp.eye(3, dtype=jnp.float32)[None],
        pbc=jnp.zeros((1, 3), bool),
        batch=None,
        edge_index=jnp.asarray(pairs),
        cell_offsets=jnp.zeros((pairs.shape[1], 3), jnp.float32),
        n_edges=jnp.int32(pairs.shape[1]),
    )
    dt, friction = 5 * FEMTOSECOND, 0.002 / FEMTOSECOND
    damping = float(np.exp(-friction * dt))

    def evaluate(positions: Array) -> tuple[Array, Array]:
        out = energy_and_gradients(model, replace(graph, positions=positions))
        return out.energy[0], -out.position_gradients

    def thermal(key: Array, which: Array, rungs: Array) -> Array:
        """Velocities of a replica's temperature, from numbers that are the replica's own."""

        def one(k: Array) -> Array:
            return jax.random.normal(jax.random.fold_in(key, k), (N_ATOMS, 3), jnp.float32)

        spread = jnp.sqrt(BOLTZMANN * ladder[rungs] / MASS)
        return spread[:, None, None] * jax.vmap(one)(which)

    def step(key: Array, which: Array, k: Array, state: Replicas) -> Replicas:
        x, v, f, _, rungs = state
        v = v + 0.5 * dt * f / MASS
        x = x + 0.5 * dt * v
        noise = thermal(jax.random.fold_in(key, k), which, rungs)
        v = damping * v + (1 - damping**2) ** 0.5 * noise
        x = x + 0.5 * dt * v
        energies, f = jax.vmap(evaluate)(x)
        return Replicas(x, v + 0.5 * dt * f / MASS, f, energies, rungs)

    def everywhere(values: Array) -> Array:
        return jax.lax.all_gather(values, "replicas", tiled=True)

    def exchange(key: Array, first: Array, which: Array, state: Replicas) -> Any:
        """Exchanges the temperatures of the rungs first and first + 1, first + 2 and …"""
        energies, rungs = everywhere(state.energies), everywhere(state.rungs)
        heat = everywhere(MASS * (state.velocities**2).sum((1, 2)) / (3 * N_ATOMS * BOLTZMANN))
        at = jnp.zeros(n, jnp.int32).at[rungs].set(jnp.arange(n, dtype=jnp.int32))
        by_rung, beta = energies[at], 1 / (BOLTZMANN * ladder)
        log_chance = (beta[:-1] - beta[1:]) * (by_rung[:-1] - by_rung[1:])
        lower = jnp.arange(n - 1)
        tried = lower % 2 == first
        accepted = tried & (jnp.log(jax.random.uniform(key, (n - 1,))) < log_chance)
        up = jnp.append(accepted, False)
        down = jnp.roll(up, 1)
        new = (rungs + up[rungs] - down[rungs]).astype(jnp.int32)[which]
        scale = jnp.sqrt(ladder[new] / ladder[state.rungs])
        velocities = state.velocities * scale[:, None, None]
        record = Record(by_rung, heat[at], accepted, tried)
        return state._replace(velocities=velocities, rungs=new), record

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=spec(), out_specs=spec(), check_vma=False)
    def run(seed: Array) -> tuple[Record, Array]:
        key = jax.random.key(seed)
        which = jax.lax.axis_index("replicas") * own + jnp.arange(own, dtype=jnp.int32)
        x = jnp.broadcast_to(graph.positions, (own, N_ATOMS, 3))
        energies, forces = jax.vmap(evaluate)(x)
        start = thermal(jax.random.fold_in(key, rounds), which, which)

        def one_round(state: Replicas, k: Array) -> Any:
            moving, exchanging = jax.random.split(jax.random.fold_in(key, k))
            state = jax.lax.fori_loop(0, steps, partial(step, moving, which), state)
            return exchange(exchanging, k % 2, which, state)

        state = Replicas(x, start, forces, energies, which)
        state, record = jax.lax.scan(one_round, state, jnp.arange(rounds))
        return record, everywhere(state.positions)

    return jax.tree.map(np.asarray, jax.block_until_ready(run(np.int32(seed))))


def report(temperatures: Sequence[float], record: Record) -> None:
    """Prints one line for each temperature."""
    print("     T, K   kinetic T, K   E, eV   exchanges with the next, accepted")
    tried = record.tried.sum(0)
    for k, temperature in enumerate(temperatures):
        kinetic, energy = record.kinetic[:, k].mean(), record.energies[:, k].mean()
        line = f"{temperature:9.1f}{kinetic:15.1f}{energy:8.3f}"
        if k < len(tried):
            line += f"{record.accepted[:, k].sum():10d} of {tried[k]}"
        print(line, flush=True)


def start_processes(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs this program once per process, and returns the largest exit status."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, *arguments, "--port", str(port)]
    running = [
        subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(options.processes)
    ]
    try:
        return max(abs(process.wait(timeout=TIMEOUT)) for process in running)
    finally:
        for process in running:
            process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the simulation and prints a table. Returns the exit status."""
    parser = argparse.ArgumentParser(description="Replica exchange of an argon cluster.")
    parser.add_argument("--processes", type=int, choices=(1, DEVICES), default=1)
    parser.add_argument("--replicas", type=int, default=8, help="an even number (default: 8)")
    parser.add_argument("--rounds", type=int, default=200, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="in a round (default: %(default)s)")
    parser.add_argument("--coldest", type=float, default=10.0, help="K (default: %(default)s)")
    parser.add_argument("--hottest", type=float, default=30.0, help="K (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write record and positions (.npz)")
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    if options.replicas < 2 or options.replicas % DEVICES:
        parser.error(f"--replicas: expected an even number, got {options.replicas}")
    if options.processes > 1 and options.port is None:
        return start_processes(options, given)

    # Before the first use of JAX: this process's devices.
    flag = f"--xla_force_host_platform_device_count={DEVICES // options.processes}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    import jax
    import numpy as np

    if options.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"localhost:{options.port}"
        jax.distributed.initialize(
            address, options.processes, options.rank, initialization_timeout=60
        )
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("replicas",))
    temperatures = np.geomspace(options.coldest, options.hottest, options.replicas)
    record, positions = simulate(
        mesh, temperatures.tolist(), options.rounds, options.steps, options.seed
    )
    if options.rank == 0:
        report(temperatures.tolist(), record)
        if options.output is not None:
            np.savez(options.output, positions=positions, **record._asdict())
    return 0


if __name__ == "__main__":
    sys.exit(main())
