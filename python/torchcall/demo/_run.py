"""The demo: prepares and runs the simulation, times the peers, prints the results."""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import torchcall
from torchcall.demo._dynamics import (
    Constants,
    Energies,
    Model,
    State,
    graph_of,
    grow_list,
    is_finite,
    make_run,
    start,
    with_gradients,
)
from torchcall.demo._peers import buffer_callback_call, pure_callback_call, with_threads
from torchcall.demo._potential import LoadedPotential, load_potential
from torchcall.demo._progress import progress
from torchcall.demo._report import Observables, draw, timing_table, write_json
from torchcall.demo._system import DemoError, included_file, read_structure, require
from torchcall.demo._timing import Run, Timing, interleave, machine, timed
from torchcall.mliap._input import input_dtypes

_ROUNDS = 9
_MAX_REPEATS = 8


def run(options: argparse.Namespace) -> None:
    """Runs the demo and prints the results.

    Raises:
        DemoError: For errors that the user can fix.
    """
    picture = _picture(options)
    potential = load_potential(options.model, options.cutoff)
    structure = read_structure(
        options.structure or included_file("argon.xyz"),
        temperature=options.temperature,
        seed=options.seed,
    )
    units = require("ase.units", "the demo")
    n_atoms, cutoff, dt = len(structure.positions), options.cutoff, options.dt * units.fs
    where = machine()
    print(
        f"torchcall {torchcall.__version__}, jax {jax.__version__}, torch {torch.__version__}, "
        f"{where['cores']} cores ({where['cpu']})"
    )

    dtype = jnp.float64 if options.float64 else jnp.float32
    state, constants = start(structure, cutoff=cutoff, skin=options.skin, dtype=dtype)
    print(
        f"{structure.name}: {structure.formula}, {int(state.neighbors.n_edges)} directed "
        f"edges within {cutoff:g} Å; TorchScript model: {potential.name}"
    )
    graph = graph_of(state.positions, state.neighbors, constants, cutoff)
    potential.learn_outputs(graph)

    def warm(state: State) -> None:
        graph = graph_of(state.positions, state.neighbors, constants, cutoff)
        print(f"torch threads in a call: {potential.warmup(graph)}", flush=True)

    warm(state)
    state = with_gradients(potential.wrapper, state, constants, cutoff)
    print(f"NVE: {options.steps} steps of {options.dt:g} fs in one jitted lax.scan", flush=True)
    steps = make_run(potential.wrapper, cutoff=cutoff, dt=dt)
    end, energies, seconds = simulate(
        steps, state, constants, options.steps,
        count=lambda: potential.wrapper.stats()["calls"],
        grown=warm,
    )  # fmt: skip
    if not is_finite(energies):
        raise DemoError(f"{potential.name}: expected finite energies, got NaN or infinity")
    observed = Observables.of(
        np.asarray(energies.potential),
        np.asarray(energies.kinetic),
        n_atoms=n_atoms,
        dt=options.dt,
        kb=units.kB,
    )
    us_per_step = seconds / options.steps * 1e6
    print(
        f"\n  energy drift    {observed.drift:+.2e} meV/atom/ps, fluctuation "
        f"{observed.fluctuation:.1e} meV/atom\n"
        f"  temperature     {observed.temperature:.1f} ± {observed.temperature_std:.1f} K\n"
        f"  whole run       {seconds:.1f} s, {us_per_step:.0f} µs per step"
    )

    timings = {"torchcall": Timing(us_per_step, 0.0, us_per_step, options.steps)}
    if not options.no_peers:
        timings = time_peers(potential, end, constants, options, cutoff, dt, us_per_step)
        print(f"\n{timing_table(timings)}", flush=True)
    if picture is not None:
        title = f"{structure.formula}, {potential.name}, NVE, time step {options.dt:g} fs"
        draw(picture, observed, title)
    if options.json is not None:
        write_json(
            options.json, f"demo, {n_atoms} atoms", observed, timings,
            steps=options.steps, atoms=n_atoms, us_per_step=us_per_step,
        )  # fmt: skip
    print(f"\n{_last_line(options, n_atoms, picture, timings)}")


def simulate(
    steps: Any,
    state: State,
    constants: Constants,
    n_steps: int,
    *,
    count: Callable[[], int],
    grown: Callable[[State], None],
) -> tuple[State, Energies, float]:
    """Runs the steps in one jitted scan. Repeats it with a larger neighbour list on overflow.

    Args:
        steps: The function from `make_run`.
        state: The initial state.
        constants: The run's constant arrays.
        n_steps: The number of steps.
        count: Returns the model's number of calls, for the progress bar.
        grown: Called with the state when its list has more capacity.

    Returns:
        The final state, the energies, and the seconds of the scan without compilation.

    Raises:
        DemoError: If the list overflows every time, or energies are not finite.
    """
    for _ in range(_MAX_REPEATS):
        compiled = steps.lower(state, constants, n_steps=n_steps).compile()
        with progress(n_steps, count, "torchcall"):
            begun = time.perf_counter()
            end, energies = jax.block_until_ready(compiled(state, constants))
            seconds = time.perf_counter() - begun
        if not bool(end.neighbors.did_overflow):
            return end, energies, seconds
        if not is_finite(energies):
            raise DemoError("the run diverged: energies are not finite: try a smaller --dt")
        print(
            f"neighbour list: {end.neighbors.why()}; repeating the run with more capacity",
            flush=True,
        )
        state = grow_list(state, end)
        grown(state)
    raise DemoError(f"the neighbour list overflowed {_MAX_REPEATS} times: try a smaller --dt")


def time_peers(
    potential: LoadedPotential,
    state: State,
    constants: Constants,
    options: argparse.Namespace,
    cutoff: float,
    dt: float,
    us_per_step: float,
) -> dict[str, Timing]:
    """Times the loop through torchcall and JAX's callbacks, interleaved, from the same state.

    All methods make the same number of steps, about 0.3 s through torchcall, and have the same
    number of torch threads.
    """
    n_steps = int(np.clip(0.3e6 / us_per_step, 1, options.steps))
    spec = {"output_spec": potential.outputs, "input_spec": (input_dtypes(),)}
    grad = potential.requires_grad
    module = with_threads(potential.module, potential.threads)
    models: dict[str, Model] = {
        "torchcall": potential.wrapper,
        "buffer_callback": buffer_callback_call(module, **spec, requires_grad=grad),
        "pure_callback": pure_callback_call(module, **spec, requires_grad=grad),
    }
    print(f"\ntiming: {_ROUNDS} rounds of {n_steps} steps per method", flush=True)
    runs = compiled_runs(models, state, constants, n_steps, cutoff=cutoff, dt=dt)
    for timed_run in runs.values():
        timed_run(n_steps)
    return interleave(runs, rounds=_ROUNDS, seconds=0.0, calls=n_steps)


def compiled_runs(
    models: dict[str, Model],
    state: State,
    constants: Constants,
    n_steps: int,
    *,
    cutoff: float,
    dt: float,
) -> dict[str, Run]:
    """For each model, a compiled run of exactly `n_steps` from this state."""

    def compiled(model: Model) -> Run:
        lowered = make_run(model, cutoff=cutoff, dt=dt).lower(state, constants, n_steps=n_steps)
        executable = lowered.compile()

        def timed_run(calls: int) -> float:
            assert calls == n_steps
            return timed(lambda: jax.block_until_ready(executable(state, constants)))

        return timed_run

    # XLA compiles without the GIL, so two threads compile at once.
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(models, pool.map(compiled, models.values()), strict=True))


def _picture(options: argparse.Namespace) -> Path | None:
    """The path of the plot; None without matplotlib, unless `--picture` was given."""
    picture = options.picture or Path("demo.png")
    try:
        require("matplotlib", "the plot")
    except DemoError as missing:
        if options.picture is not None:
            raise
        print(f"torchcall: {missing}")
        return None
    if not picture.absolute().parent.is_dir():
        raise DemoError(f"--picture {picture}: no such folder: {picture.absolute().parent}")
    return picture


def _last_line(
    options: argparse.Namespace, n_atoms: int, picture: Path | None, timings: dict[str, Timing]
) -> str:
    """A summary, and what to try next."""
    drawn = f", plotted in {picture}" if picture is not None else ""
    base = timings["torchcall"].us_median
    faster = [
        f"{100 * (timing.us_median / base - 1):.0f} % longer through {name}"
        for name, timing in timings.items()
        if timing.us_median > base
    ]
    compared = f" (a step takes {' and '.join(faster)})" if faster else ""
    if options.model is None or options.structure is None:
        follow = "python -m torchcall demo --structure YOUR.xyz --model YOUR.pt --cutoff ITS_CUTOFF"
    else:
        follow = "the same run with --steps 10000 or --temperature 300"
    time_run = options.steps * options.dt * 1e-3
    return f"simulated {n_atoms} atoms for {time_run:g} ps{drawn}{compared}. Try next: {follow}"
