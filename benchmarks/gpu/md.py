"""Cost of a potential on a GPU: µs per call in one jitted loop, and per step of a simulation.

    python benchmarks/gpu/md.py --json benchmarks/results/gpu_md.json
    python benchmarks/gpu/md.py --device cpu --quick        # a dry run without a GPU

64 to 16384 atoms of Lennard-Jones and of a message-passing network: torch alone (in a Python loop
and as a CUDA graph), JAX's callbacks, and torchcall without and with CUDA graphs, for each engine.
Every method casts the same int32 indices and writes its results to the same places. "XLA's loop" is
the loop without a call. Steps are velocity Verlet with the static schedule of `run_chunks`: a
search for neighbours every ten steps, and no condition on the host.
"""

import argparse
import copy
import sys
import time
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from _claims import call_claims
from _common import (
    Device,
    GpuReport,
    Loop,
    Run,
    call_loop,
    compiled,
    device_of,
    gpu_parser,
    graph_at,
    neighbors_of,
    potentials,
    timed_loop,
)
from _models import EAGER, ENGINES, PACKAGE, SCRIPT, Engines, engines_of
from _peers import KEYS, Torch, buffer_call, pure_call
from _steps import step_loop

from torchcall.mliap import AtomGraphInput, pad_graph

ATOMS = (64, 256, 1024, 4096, 16384)
PYTHON, GRAPH = "torch, Python loop", "torch, CUDA graph"
OFF, CAPTURED = "torchcall, uncaptured", "torchcall, captured"
BUFFER, PURE, EMPTY = "buffer_callback", "pure_callback", "XLA's loop, no call"


def methods(
    engines: Engines, device: Device, wanted: list[str]
) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """JAX's ways to call, torchcall's models among them, and each way's engine; by row."""
    calls: dict[str, Any] = {}
    models: dict[str, Any] = {}
    engine_of: dict[str, str] = {}
    for engine in [e for e in ENGINES if e in engines.forwards and e in wanted]:
        for method, setting in ((OFF, "off"), (CAPTURED, "auto")):
            if setting == "auto" and not device.is_gpu:
                continue
            row = f"{method}, {engine}"
            models[row] = engines.model(engine, cuda_graph=setting)
            calls[row] = models[row].call
            engine_of[row] = engine
        row = f"{BUFFER}, {engine}"
        calls[row], engine_of[row] = buffer_call(engines.forwards[engine], device), engine
    row = f"{PURE}, {SCRIPT}"
    if SCRIPT in wanted:
        calls[row], engine_of[row] = pure_call(engines.forwards[SCRIPT], device), SCRIPT
    return calls, models, engine_of


def torch_runs(
    engines: Engines,
    graph: AtomGraphInput,
    device: Device,
    wanted: list[str],
    expected: Any,
    out: Any,
) -> tuple[dict[str, Run], dict[str, str]]:
    """Torch alone: a Python loop and a CUDA graph by engine; `out(method, reason)` if it fails."""
    runs: dict[str, Run] = {}
    engine_of: dict[str, str] = {}
    alones: dict[str, Torch] = {}
    for engine in [e for e in ENGINES if e in engines.forwards and e in wanted]:
        alone = alones[engine] = Torch(engines.forwards[engine], graph, device)
        runs[f"{PYTHON}, {engine}"] = alone.loop()
        if device.is_gpu:
            try:
                runs[f"{GRAPH}, {engine}"] = alone.graph_loop()
            except RuntimeError as error:
                out(f"{GRAPH}, {engine}", str(error))
    for row in list(runs):
        engine_of[row] = row.rsplit(", ", 1)[1]
        results = alones[engine_of[row]].results
        for result in results:
            result.zero_()
        runs[row](20)  # TorchScript's executor recompiles in its first calls
        found = {key: result.cpu() for key, result in zip(KEYS, results, strict=True)}
        if expected is not None and (wrong := differs(found, expected)):
            out(row, wrong)
            del runs[row]
    return runs, engine_of


def differs(found: Any, expected: Any) -> str:
    """In what results differ from float64's beyond what float32 explains; empty if in nothing."""
    for key in ("energy", "position_gradients"):
        got, right = np.asarray(found[key], float), np.asarray(expected[key], float)
        if not np.isfinite(got).all() or np.abs(got - right).max() > 1e-3 * np.abs(right).max():
            error = np.abs(got - right).max()
            return f"{key}: wrong by {error:g}, of {np.abs(right).max():g}"
    return ""


def expected_of(engines: Engines, graph: AtomGraphInput) -> dict[str, Any]:
    """The eager module's results in float64, computed by torch alone."""
    on = next(iter(engines.module.buffers()), torch.zeros(())).device
    exact = copy.deepcopy(engines.module).double()
    tensors = {k: torch.from_numpy(np.array(v)).to(on) for k, v in graph.items()}
    tensors = {
        k: t.double() if t.is_floating_point() else t.long() if t.dtype == torch.int32 else t
        for k, t in tensors.items()
    }
    return {k: v.detach().cpu().numpy() for k, v in exact(tensors).items()}


def time_calls(report: GpuReport, engines: Engines, n_atoms: int, device: Device) -> None:
    """The model call alone, by every method."""
    options = report.options
    neighbors = neighbors_of(n_atoms, engines.cutoff)
    graph, _ = pad_graph(
        graph_at(neighbors.positions, neighbors.cell, neighbors), cutoff=engines.cutoff
    )
    n_edges = graph["edge_index"].shape[1]
    case = f"calls, {engines.name}, {n_atoms} atoms, {n_edges} edges"
    out = partial(report.leave_out, case)
    length = 3 if options.quick else 100 if n_atoms <= 4096 else 25
    calls, models, engine_of = methods(engines, device, options.engines)
    loops: dict[str, Loop] = {row: call_loop(call, (graph,), length) for row, call in calls.items()}
    loops[EMPTY] = call_loop(lambda graph: graph["pos"], (graph,), length)
    expected = expected_of(engines, graph) if n_atoms <= 1024 else None
    runs, of_torch = torch_runs(engines, graph, device, options.engines, expected, out)
    engine_of |= of_torch
    executables = compiled(loops)
    for row, executable in executables.items():
        if isinstance(executable, Exception):
            out(row, str(executable))
            continue
        run = timed_loop(executable, (graph,), length)
        try:
            run(2 * length)
            if row in models:
                check_model(row, models[row], run, length)
            if row in calls and expected is not None:
                wrong = differs(jax.jit(calls[row])(graph), expected)
                if wrong:
                    raise RuntimeError(wrong)
        except RuntimeError as error:
            out(row, str(error))
            continue
        runs[row] = run
    timings = report.time(case, runs, engines={EMPTY: "none"} | engine_of)
    call_claims(report, case, n_atoms, {row: t.us_median for row, t in timings.items()})


def check_model(row: str, model: Any, run: Run, length: int) -> None:
    """That a loop makes the calls it should, and that what is called captured is captured.

    Raises:
        RuntimeError: It does not.
    """
    before = model.wrapper.stats()
    run(length)
    after = model.wrapper.stats()
    if after["calls"] - before["calls"] != length:
        raise RuntimeError(f"expected {length} calls, got {after['calls'] - before['calls']}")
    replayed = after["graph_replays"] - before["graph_replays"]
    wanted = length if row.startswith(CAPTURED) else 0
    if replayed != wanted:
        raise RuntimeError(
            f"expected {wanted} replays, got {replayed}; fallback: {after['fallback']}"
        )


def time_steps(report: GpuReport, engines: Engines, n_atoms: int, device: Device) -> None:
    """Whole steps, by every method that a JAX program can use."""
    options = report.options
    case = f"steps, {engines.name}, {n_atoms} atoms"
    out = partial(report.leave_out, case)
    length = 10 if options.quick else 100 if n_atoms <= 1024 else 20
    calls, models, engine_of = methods(engines, device, options.engines)
    callables = {
        row: models.get(row, call)
        for row, call in calls.items()
        if row in models or row.endswith(SCRIPT)
    }
    loops = {row: step_loop(model, engines, n_atoms, length) for row, model in callables.items()}
    runs: dict[str, Run] = {}
    for row, executable in compiled(loops).items():
        if isinstance(executable, Exception):
            out(row, str(executable))
            continue
        run = timed_loop(executable, loops[row][1], length)
        try:
            run(2 * length)
            overflowed, energy = executable(*loops[row][1])
            if bool(overflowed) or not np.isfinite(np.asarray(energy)):
                raise RuntimeError("the neighbour list overflowed, or the energy is not finite")
        except RuntimeError as error:
            out(row, str(error))
            continue
        runs[row] = run
    report.time(case, runs, engines=engine_of, calls=length, most_rounds=5)


def options_of(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    result = gpu_parser(__doc__ or "")
    result.add_argument("--atoms", type=int, nargs="+", help=f"default: {ATOMS}")
    result.add_argument("--engines", nargs="+", choices=ENGINES)
    result.add_argument("--potentials", nargs="+", choices=list(potentials(1)))
    result.add_argument("--packages-only", action="store_true", help="compile packages, and end")
    options = result.parse_args(argv)
    # Compiling a package takes half a minute: a smoke test goes without.
    quick_engines = [SCRIPT, EAGER]
    options.engines = options.engines or (quick_engines if options.quick else list(ENGINES))
    options.atoms = options.atoms or ((64,) if options.quick else ATOMS)
    options.potentials = options.potentials or list(potentials(1))
    return options


def main(argv: list[str] | None = None) -> int:
    """Times calls at each size, then steps."""
    options = options_of(argv)
    device = device_of(options.device)
    report = GpuReport("Potentials on a GPU", options, device)
    models = engines_of(potentials(), options, device, report.leave_out)
    if options.packages_only:
        return int(any(PACKAGE not in model.forwards for model in models))
    # What matters most comes first, should time run out.
    for kind, run in (("calls", time_calls), ("steps", time_steps)):
        for n_atoms in options.atoms:
            for engines in models:
                name = f"{kind}, {engines.name}, {n_atoms} atoms"
                if options.only not in name or not report.has_time_for(name, kind):
                    continue
                begun = time.monotonic()
                try:
                    run(report, engines, n_atoms, device)
                except (RuntimeError, ValueError) as error:
                    report.leave_out(name, "all", str(error))
                report.took(kind, time.monotonic() - begun)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
