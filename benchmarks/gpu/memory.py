"""How XLA and torch share a card's memory, for several settings.

    python benchmarks/gpu/memory.py --json benchmarks/results/gpu_memory.json

Each setting runs in a separate process. A potential runs in a jitted loop, and its time and memory
are measured. Then each framework allocates half of the card's free memory and frees it, and the
other one allocates as much. This succeeds only if they share a pool.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from _built import command

SETTINGS: dict[str, dict[str, str]] = {
    "JAX's default": {},
    "no preallocation": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    "one pool: cuda_async, cudaMallocAsync": {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync",
    },
    "half preallocated": {"XLA_PYTHON_CLIENT_MEM_FRACTION": ".50"},
    "cuda_async, torch's own pool": {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    },
}
NAMES = {name for setting in SETTINGS.values() for name in setting} | {"PYTORCH_ALLOC_CONF"}
GIB = 2**30


def child(options: argparse.Namespace) -> dict[str, Any]:
    """Measures in this process; the environment is the setting."""
    import jax
    import numpy as np
    import torch
    from _common import call_loop, device_of, graph_at, neighbors_of, potentials, timed_loop
    from _models import SCRIPT, Engines

    from torchcall.mliap import pad_graph

    device = device_of(options.device)
    found: dict[str, Any] = {}

    def note(name: str) -> None:
        if device.is_gpu:
            free, total = torch.cuda.mem_get_info(device.of_torch)
            found[f"{name}_free_gib"] = round(free / GIB, 2)
            found["card_gib"] = round(total / GIB, 2)

    note("before_jax")
    module, cutoff = potentials(16)["Lennard-Jones"]
    neighbors = neighbors_of(options.atoms, cutoff)
    note("with_jax")
    graph, _ = pad_graph(graph_at(neighbors.positions, neighbors.cell, neighbors), cutoff=cutoff)
    engines = Engines("Lennard-Jones", module, cutoff, device, None)
    length = 10 if options.quick else 100
    for method, setting in (("uncaptured", "off"), ("captured", "auto")):
        model = engines.model(SCRIPT, cuda_graph=setting)
        loop, args = call_loop(model.call, (graph,), length)
        run = timed_loop(loop, args, length)
        run(2 * length)
        samples = [run(length) / length * 1e6 for _ in range(5)]
        found[f"{method}_us"] = round(float(np.median(samples)), 2)
        found[f"{method}_replays"] = model.wrapper.stats()["graph_replays"]
    note("with_model")
    if device.is_gpu:
        found["torch_reserved_gib"] = round(torch.cuda.memory_reserved(device.of_torch) / GIB, 2)
        stats = device.of_jax.memory_stats() or {}
        found["xla_in_use_gib"] = round(stats.get("bytes_in_use", 0) / GIB, 2)
        found |= handed_over(device)
    jax.clear_caches()
    return found


def handed_over(device: Any) -> dict[str, Any]:
    """Whether one framework can allocate the memory that the other freed."""
    import jax.numpy as jnp
    import torch

    def through_torch(n_bytes: int) -> None:
        taken = torch.empty(n_bytes, dtype=torch.uint8, device=device.of_torch)
        taken.fill_(1)
        device.wait()

    def through_jax(n_bytes: int) -> None:
        jnp.ones(n_bytes, jnp.uint8).block_until_ready().delete()

    result: dict[str, Any] = {}
    for name, first, second in (
        ("torch_to_jax", through_torch, through_jax),
        ("jax_to_torch", through_jax, through_torch),
    ):
        free, _ = torch.cuda.mem_get_info(device.of_torch)
        n_bytes = int(0.55 * free)
        for who, take in (("first", first), ("second", second)):
            try:
                take(n_bytes)
                result[f"{name}_{who}"] = "yes"
            except RuntimeError as error:  # both frameworks' errors are ones
                result[f"{name}_{who}"] = f"no: {str(error).splitlines()[0][:120]}"
        torch.cuda.empty_cache()
        result[f"{name}_gib"] = round(n_bytes / GIB, 2)
    return result


def measured(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """A setting's row, or the error."""
    plain = {key: value for key, value in os.environ.items() if key not in NAMES}
    arguments = ["--child", "--device", options.device, "--atoms", options.atoms]
    arguments += ["--quick"] if options.quick else []
    row: dict[str, Any] = {"case": "memory", "method": name, "setting": SETTINGS[name]}
    try:
        done = subprocess.run(
            command(__file__, *arguments), env=plain | SETTINGS[name], timeout=seconds,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return row | {"error": f"not done within {seconds:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        last = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        return row | {"error": f"exit status {done.returncode}: {last}"}
    return row | json.loads(lines[-1])


def main(argv: list[str] | None = None) -> int:
    """Tries the settings within the budget. The exit status is 1 if none worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--quick", action="store_true", help="one setting, few calls")
    parser.add_argument("--atoms", type=int, default=1024, help="a power of two (default: 1024)")
    parser.add_argument("--budget", type=float, default=300.0, help="seconds (default: 300)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(child(options)))
        return 0
    begun = time.monotonic()
    rows = []
    for name in list(SETTINGS)[: 1 if options.quick else None]:
        left = options.budget - (time.monotonic() - begun)
        row = measured(name, options, left) if left > 10 else {"method": name, "error": "no time"}
        rows.append(row)
        shown = {k: v for k, v in row.items() if k not in ("case", "method", "setting")}
        print(f"{name}\n  " + "\n  ".join(f"{k:<24}{v}" for k, v in shown.items()), flush=True)
        if options.json:
            from pathlib import Path

            from _common import where

            machine, versions = where()
            document = {"machine": machine, "versions": versions, "rows": rows}
            Path(options.json).parent.mkdir(parents=True, exist_ok=True)
            Path(options.json).write_text(json.dumps(document, indent=2) + "\n")
    refused = sum("error" in row for row in rows)
    print(f"{len(rows)} settings, {refused} of them without a result")
    # One of the settings may well be refused; that is a result.
    return int(all("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
