"""Shared code of the GPU benchmarks: device, problems without ASE, loops of fixed length, reports.

On a GPU, a loop whose length is computed copies its condition to the host in every iteration. So
all loops here have lengths known to the compiler. Each is compiled separately, in parallel. With
`--device cpu` everything runs on the CPU: a dry run, whose figures say nothing about a GPU.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchcall._command.included import load_example
from torchcall.demo._timing import Run, Timing, machine, timed, versions
from torchcall.mliap import AtomGraph, NeighborList, neighbor_list

sys.path.append(str(Path(__file__).parents[1]))  # for the modules of benchmarks/
from _harness import Report, parser

SPACING = 3.64  # Å; its inverse cube is the density of liquid argon, 0.0207 atoms/Å³


@dataclass(frozen=True)
class Device:
    """Where a benchmark runs, as both frameworks call it."""

    of_jax: Any
    of_torch: torch.device

    @property
    def is_gpu(self) -> bool:
        """Whether it is a CUDA device."""
        return self.of_torch.type == "cuda"

    def wait(self) -> None:
        """Waits for torch's work."""
        if self.is_gpu:
            torch.cuda.synchronize(self.of_torch)


def gpu_parser(description: str) -> argparse.ArgumentParser:
    """The options of all benchmarks and of the GPU benchmarks."""
    result = parser(description)
    result.set_defaults(rounds=7, seconds=0.05)
    result.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run (default: cuda)"
    )
    result.add_argument(
        "--budget", type=float, metavar="S", default=float("inf"),
        help="start no case that would end later than S seconds after the start",
    )  # fmt: skip
    return result


def device_of(name: str) -> Device:
    """The first device of that kind, as JAX's default device from now on.

    Raises:
        SystemExit: torch or JAX sees none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torchcall: no CUDA device: torch {torch.__version__} sees none")
    try:
        device = jax.devices(name)[0]
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SystemExit(f"torchcall: no {name} device: JAX {jax.__version__}: {reason}") from error
    jax.config.update("jax_default_device", device)
    return Device(device, torch.device("cuda", 0) if name == "cuda" else torch.device("cpu"))


def driver() -> dict[str, str]:
    """The card's name, memory and driver, by nvidia-smi or torch; empty where there is none."""
    fields = ("name", "memory.total", "driver_version")
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
        values = found.stdout.splitlines()[0].split(", ")
    except (OSError, subprocess.SubprocessError, IndexError):
        return {"gpu": torch.cuda.get_device_name(0)} if torch.cuda.is_available() else {}
    return {"gpu": values[0], "gpu_memory": values[1], "driver": values[2]}


def where() -> tuple[dict[str, object], dict[str, str]]:
    """Machine and versions, with those of the GPU."""
    found = versions()
    if torch.version.cuda:
        found["torch_cuda"] = torch.version.cuda
    return machine() | driver(), found


class GpuReport(Report):
    """A report that writes its file after every case and has a time budget."""

    def __init__(self, title: str, options: argparse.Namespace, device: Device) -> None:
        super().__init__(title, options)
        self.begun = time.monotonic()
        self.device = device
        self.left_out: list[dict[str, str]] = []
        self.broken = False
        self.longest: dict[str, float] = {}
        self.on_device = where()
        on = self.on_device[0].get("gpu", "a CPU: a dry run, its figures say nothing about a GPU")
        print(f"on {on}", flush=True)

    def time(
        self,
        case: str,
        methods: Mapping[str, Run],
        *,
        calls: int | None = None,
        most_rounds: int | None = None,
        engines: Mapping[str, str] | None = None,
    ) -> dict[str, Timing]:
        """As `Report.time`, then the file."""
        timings = super().time(case, methods, calls=calls, most_rounds=most_rounds, engines=engines)
        self.write()
        return timings

    def leave_out(self, case: str, method: str, reason: str) -> None:
        """Records a missing row and the reason."""
        line = reason.strip().splitlines()[0] if reason.strip() else "no reason given"
        self.left_out.append({"case": case, "method": method, "reason": line})
        self.broken = self.broken or method.startswith("torchcall")
        print(f"  left out: {case}: {method}: {line}", flush=True)

    def has_time_for(self, case: str, kind: str) -> bool:
        """Whether the budget allows a case as long as the longest of its kind so far."""
        if time.monotonic() - self.begun + self.longest.get(kind, 0) <= self.options.budget:
            return True
        self.leave_out(case, "all", "the time budget is used up")
        return False

    def took(self, kind: str, seconds: float) -> None:
        """Records the time of a case."""
        self.longest[kind] = max(seconds, self.longest.get(kind, 0))

    def write(self) -> None:
        """Writes the results so far."""
        if self.options.json is None:
            return
        document = {
            "machine": self.on_device[0],
            "versions": self.on_device[1],
            "rows": self.rows,
            "claims": [
                {"case": c.case, "text": c.text, "value": c.value, "limit": c.limit,
                 "holds": c.holds}
                for c in self.claims
            ],
            "left_out": self.left_out,
        }  # fmt: skip
        self.options.json.parent.mkdir(parents=True, exist_ok=True)
        self.options.json.write_text(json.dumps(document, indent=2) + "\n")

    def finish(self) -> int:
        """Prints the claims and writes the file. The exit status is 1 only with `--check`."""
        if self.claims:
            print()
        for claim in self.claims:
            print(claim)
        self.write()
        # A missing row of torchcall is a failure, unless the time budget was used up.
        held = all(claim.holds for claim in self.claims)
        failed = self.broken or not held or not self.rows
        met = sum(claim.holds for claim in self.claims)
        print(
            f"{len(self.rows)} rows, {met} of {len(self.claims)} goals met, "
            f"{len(self.left_out)} left out"
        )
        return int(failed and self.options.check)


def box(n_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cell of 2ᵏ atoms at liquid argon's density, on a distorted simple lattice.

    Raises:
        ValueError: If `n_atoms` is no power of two.
    """
    power = n_atoms.bit_length() - 1
    if n_atoms != 1 << power:
        raise ValueError(f"n_atoms: expected a power of two, got {n_atoms}")
    counts = [1 << ((power + k) // 3) for k in range(3)]
    lattice = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, 3)
    noise = np.random.default_rng(0).normal(scale=0.1, size=lattice.shape)
    return lattice * SPACING + noise, np.diag(counts) * SPACING


@lru_cache(maxsize=32)
def neighbors_of(
    n_atoms: int, cutoff: float, *, skin: float = 0.0, slack: float = 1.0
) -> NeighborList:
    """The neighbour list of `box(n_atoms)`, in float32, on the default device.

    It is allocated on the CPU, where the programs that choose its sizes compile faster.
    """
    positions, cell = box(n_atoms)
    search = neighbor_list(cutoff, skin=skin, capacity_multiplier=slack)
    with jax.default_device(jax.devices("cpu")[0]):
        neighbors = search.allocate(
            jnp.asarray(positions, jnp.float32),
            jnp.asarray(cell, jnp.float32)[None],
            jnp.ones((1, 3), bool),
            jnp.zeros(n_atoms, jnp.int32),
        )
    return jax.device_put(neighbors, next(iter(jnp.zeros(()).devices())))


def graph_at(positions: Any, cell: Any, neighbors: NeighborList) -> AtomGraph:
    """The argon graph of a periodic system and its list."""
    return AtomGraph(
        positions=positions,
        atomic_numbers=jnp.full(positions.shape[0], 18, jnp.int32),
        cell=cell,
        pbc=jnp.ones((1, 3), bool),
        batch=None,
        edge_index=neighbors.edge_index,
        cell_offsets=neighbors.cell_offsets,
        n_edges=neighbors.n_edges,
    )


def potentials(features: int = 64) -> dict[str, tuple[torch.nn.Module, float]]:
    """The modules, which both differentiate inside, each with its cutoff in Å."""
    lennard_jones = load_example("lennard_jones").LennardJones(cutoff=8.5, autograd=True)
    network = load_example("message_passing").MessagePassing(cutoff=5.0, features=features)
    return {
        "Lennard-Jones": (lennard_jones.eval(), 8.5),
        "message passing": (network.eval(), 5.0),
    }


Loop = tuple[Any, tuple[Any, ...]]
"""A jitted function and its arguments."""


def call_loop(call: Callable[..., Any], args: tuple[Any, ...], length: int) -> Loop:
    """A jitted loop of `length` calls, each after the one before it, and its arguments."""

    def loop(*args: Any) -> jax.Array:
        def body(_: int, carry: jax.Array) -> jax.Array:
            operands, carry = jax.lax.optimization_barrier((args, carry))
            first = jax.tree.leaves(call(*operands))[0]
            # 0 × carry uses the barrier's second output, so XLA keeps the calls in order.
            return 0 * carry + first[(0,) * first.ndim].astype(jnp.float32)

        return jax.lax.fori_loop(0, length, body, jnp.float32(0))

    return jax.jit(loop), args


def compiled(loops: Mapping[str, Loop]) -> dict[str, Any]:
    """Every loop compiled, or the exception that it ended in; XLA compiles without the GIL."""

    def compile_one(loop: Loop) -> Any:
        try:
            return loop[0].lower(*loop[1]).compile()
        except Exception as error:  # whatever lowering raises is a missing row, not the end
            return error

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(zip(loops, pool.map(compile_one, loops.values()), strict=True))


def timed_loop(executable: Any, args: tuple[Any, ...], length: int) -> Run:
    """`run(calls)`: as many executions as make at least that many calls; seconds for `calls`."""

    def run(calls: int) -> float:
        executions = -(-calls // length)

        def execute() -> None:
            results = [executable(*args) for _ in range(executions)]
            jax.block_until_ready(results[-1])

        return timed(execute) * calls / (executions * length)

    return run
