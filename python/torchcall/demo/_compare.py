"""Times the steps of a run through torchcall and through JAX's callbacks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from torchcall.demo._peers import buffer_callback_call, pure_callback_call, with_threads
from torchcall.demo._timing import Run as TimedRun
from torchcall.demo._timing import Timing, interleave, timed
from torchcall.md.run import Run
from torchcall.md.simulation import Simulation
from torchcall.mliap._input import input_dtypes

ROUNDS = 9


def compare(run: Run, module: Any) -> dict[str, Timing]:
    """Times one record of steps by each method, interleaved, from the run's last state.

    All methods call the module on the same padded arrays with the same number of threads.

    Args:
        run: A run that has ended, of one group.
        module: The TorchScript module of its model.

    Returns:
        µs per step by method.
    """
    model, (group,) = run.model, run.done.groups
    spec: dict[str, Any] = {"output_spec": model.output_specs, "input_spec": (input_dtypes(),)}
    called = with_threads(module, run.options.threads)
    makers: dict[str, Callable[..., Any]] = {
        "buffer_callback": buffer_callback_call,
        "pure_callback": pure_callback_call,
    }
    models: dict[str, Any] = {"torchcall": replace(model, narrow=False)}
    for name, make in makers.items():
        models[name] = replace(model, wrapper=make(called, **spec), narrow=False)

    def timed_run(simulation: Simulation) -> TimedRun:
        def record(calls: int) -> float:
            assert calls == run.options.every
            return timed(lambda: jax.block_until_ready(simulation.advance(group).state.last.energy))

        record(run.options.every)
        return record

    runs = {name: timed_run(run.simulation_of(other)) for name, other in models.items()}
    return interleave(runs, rounds=ROUNDS, seconds=0.0, calls=run.options.every)


def timing_table(timings: dict[str, Timing]) -> str:
    """µs per step of each method, and the ratio to torchcall."""
    base = timings["torchcall"].us_median
    lines = [f"  {'one step through':<26}{'µs':>9}{'± IQR':>9}{'':>4}ratio"]
    for name, timing in timings.items():
        ratio = "1" if name == "torchcall" else f"{timing.us_median / base:.2f} × torchcall's time"
        lines.append(f"  {name:<26}{timing.us_median:>9.0f}{timing.us_iqr:>9.0f}{'':>4}{ratio}")
    return "\n".join(lines)


def rows(timings: dict[str, Timing], n_atoms: int) -> list[dict[str, Any]]:
    """The timings in the format of the benchmarks."""
    return [
        {"case": f"demo, {n_atoms} atoms", "method": name, "engine": "TorchScript",
         "us_median": timing.us_median, "us_iqr": timing.us_iqr, "n": timing.n}
        for name, timing in timings.items()
    ]  # fmt: skip
