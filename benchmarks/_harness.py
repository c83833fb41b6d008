"""Shared code of the benchmarks: methods that call a module, timing, claims, tables and JSON.

Every JAX method runs inside one jitted `fori_loop` whose operands are arguments of the jitted
function, because XLA rebuilds closed-over constants in each iteration. A scalar carried through an
optimization barrier makes each call depend on the previous one, so that XLA cannot merge, hoist or
remove calls. The loop checks this by counting calls.
"""

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from _native_loop import script_loop
from _record import record

import torchcall
from torchcall._command.included import load_example
from torchcall.demo._peers import (
    CallCounter,
    buffer_callback_call,
    pure_callback_call,
    wrap_torch2jax_call,
)
from torchcall.demo._timing import Run, Timing, interleave, machine, timed, versions
from torchcall.mliap import AtomGraph, AtomGraphInput, neighbor_list, pad_graph
from torchcall.mliap._input import input_dtypes, output_specs

FLOOR, PYTHON, TORCHCALL = "torch, C++ loop", "torch, Python loop", "torchcall"
BUFFER, WRAP, PURE = "buffer_callback", "wrap_torch2jax", "pure_callback"
MEMCPY = "memcpy of the output"


@dataclass(frozen=True)
class Problem:
    """A module and what it is called with.

    Attributes:
        case: Its name in tables and files.
        module: A TorchScript module.
        args: Pytrees of JAX arrays.
        output_spec: Function from the arguments to a pytree of `jax.ShapeDtypeStruct`.
        input_spec: Pytree prefix of `args`: dtypes to cast to in torch, or None.
        requires_grad: Whether the module differentiates internally.
    """

    case: str
    module: Any
    args: tuple[Any, ...]
    output_spec: Callable[..., Any]
    input_spec: Any = None
    requires_grad: bool = False

    def options(self) -> dict[str, Any]:
        """The options that torchcall and every peer get."""
        return {
            "output_spec": self.output_spec,
            "input_spec": self.input_spec,
            "requires_grad": self.requires_grad,
        }

    def tensors(self) -> tuple[Any, ...]:
        """The arguments as torch tensors of the dtypes that the model gets."""
        leaves, tree = jax.tree.flatten(self.args)
        none = {"is_leaf": lambda leaf: leaf is None}
        dtypes = jax.tree.leaves(jax.tree.broadcast(self.input_spec, self.args, **none), **none)
        tensors = [
            torch.from_dlpack(leaf).to(dtype, copy=True)
            for leaf, dtype in zip(leaves, dtypes, strict=True)
        ]
        return tree.unflatten(tensors)


@dataclass(frozen=True)
class Claim:
    """A requirement: `value <= limit` if `at_most`, else `value >= limit`."""

    case: str
    text: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        """Whether the requirement is met."""
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def __str__(self) -> str:
        sign = "<=" if self.at_most else ">="
        verdict = "PASS" if self.holds else "FAIL"
        return (
            f"{verdict}  {self.case}: {self.text}: {self.value:.2f} (must be {sign} {self.limit:g})"
        )


class Report:
    """Collects a benchmark's rows and claims, prints them, and writes the JSON file."""

    def __init__(self, title: str, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, object]] = []
        self.found: dict[str, object] = {}  # other results, by case
        self.part_of: str | None = None  # the command that this run adds to; see `record`
        self.claims: list[Claim] = []
        found = "  ".join(f"{name} {version}" for name, version in versions().items())
        where = machine()
        print(
            f"{title}\n{where['cpu']}, {where['cores']} cores, {where['os']}\n{found}", flush=True
        )

    def time(
        self,
        case: str,
        methods: Mapping[str, Run],
        *,
        calls: int | None = None,
        most_rounds: int | None = None,
        engines: Mapping[str, str] | None = None,
    ) -> dict[str, Timing]:
        """Times a case's methods in interleaved rounds and prints its table.

        Args:
            case: Its name.
            methods: By name.
            calls: Calls per round; None: as many as fit into its length.
            most_rounds: An upper limit of rounds, for slow methods.
            engines: The engine of each method; TorchScript if it is missing.
        """
        seconds = self.options.seconds
        rounds = min(self.options.rounds, most_rounds or self.options.rounds)
        if self.options.quick:
            rounds, seconds = 2, 0.002
        timings = interleave(methods, rounds=rounds, seconds=seconds, calls=calls)
        base = timings.get(TORCHCALL)
        print(f"\n{case}\n  {'method':<34}{'µs':>12}{'± IQR':>11}{'vs torchcall':>15}")
        for name, timing in timings.items():
            ratio = f"{timing.us_median / base.us_median:.2f}" if base else ""
            print(f"  {name:<34}{timing.us_median:>12.2f}{timing.us_iqr:>11.2f}{ratio:>15}")
            self.rows.append(
                {
                    "case": case,
                    "method": name,
                    "engine": ({MEMCPY: "none"} | dict(engines or {})).get(name, "TorchScript"),
                    "us_median": timing.us_median,
                    "us_iqr": timing.us_iqr,
                    "us_least": timing.us_least,
                    "n": timing.n,
                }
            )
        print(end="", flush=True)
        return timings

    def claim(
        self, case: str, text: str, value: float, limit: float, *, at_most: bool = True
    ) -> None:
        """Adds a requirement of this run."""
        self.claims.append(Claim(case, text, value, limit, at_most))

    def finish(self) -> int:
        """Prints the claims and writes the file. The exit status is 1 only with `--check`."""
        if self.claims:
            print()
        for claim in self.claims:
            print(claim)
        self.save()
        failed = not all(claim.holds for claim in self.claims)
        return int(failed and self.options.check)

    def save(self) -> None:
        """Writes the file, if there is one; see `finish`."""
        if self.options.json is not None:
            more = {"found": self.found} if self.found else {}
            record(self.options.json, self.rows, part_of=self.part_of, **more)


def parser(description: str) -> argparse.ArgumentParser:
    """The options of all benchmarks."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    result.add_argument(
        "--quick", action="store_true", help="few short rounds: a smoke test, no usable figures"
    )
    result.add_argument("--check", action="store_true", help="exit with 1 if a claim does not hold")
    # Many short rounds: on shared cores the speed changes within seconds.
    result.add_argument("--rounds", type=int, default=61, help="rounds per method (default: 61)")
    result.add_argument(
        "--seconds", type=float, default=0.025, help="length of a round (default: 0.025)"
    )
    result.add_argument(
        "--only", metavar="TEXT", default="", help="only cases whose name contains TEXT"
    )
    result.add_argument(
        "--without",
        action="append",
        default=[],
        choices=[BUFFER, WRAP, PURE],
        help="leave out a peer",
    )
    return result


def graph_of(positions: np.ndarray, cell: np.ndarray, cutoff: float, *, slack: float) -> AtomGraph:
    """The graph of one cubic periodic system, with `slack` times as many edge slots as edges."""
    system = jnp.asarray(cell, jnp.float32)[None], jnp.ones((1, 3), bool)
    pos, batch = jnp.asarray(positions, jnp.float32), jnp.zeros(len(positions), jnp.int32)
    search = neighbor_list(cutoff, capacity_multiplier=slack)
    neighbors = search.allocate(pos, *system, batch)
    return AtomGraph(
        positions=pos,
        atomic_numbers=jnp.full(len(positions), 18, jnp.int32),
        cell=system[0],
        pbc=system[1],
        batch=None,
        edge_index=neighbors.edge_index,
        cell_offsets=neighbors.cell_offsets,
        n_edges=neighbors.n_edges,
    )


def tensors_of(graph: AtomGraphInput) -> dict[str, torch.Tensor]:
    """A padded graph as torch tensors of the dtypes that the model gets."""
    dtypes = {key: dtype for key, dtype in input_dtypes().items() if key in graph}
    return {
        key: torch.from_dlpack(graph[key]).to(dtype, copy=True) for key, dtype in dtypes.items()
    }


def graph_problem(case: str, positions: np.ndarray, cell: np.ndarray, *, cutoff: float) -> Problem:
    """Lennard-Jones argon with int64 indices inside torch, without spare edge slots."""
    atoms = graph_of(positions, cell, cutoff, slack=1.0)
    graph, _ = pad_graph(atoms, cutoff=cutoff)
    module = torch.jit.script(load_example("lennard_jones").LennardJones(cutoff=cutoff).eval())
    return Problem(
        f"{case}, {len(positions)} atoms, {graph['edge_index'].shape[1]} edges",
        module,
        (graph,),
        output_specs,
        input_spec=(input_dtypes(),),
    )


def liquid(n_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and cell of n³ atoms at liquid argon's density, on a distorted cubic lattice.

    Raises:
        ValueError: If `n_atoms` is not the cube of a whole number.
    """
    n = round(n_atoms ** (1 / 3))
    if n**3 != n_atoms:
        raise ValueError(f"n_atoms: expected the cube of a whole number, got {n_atoms}")
    spacing = 3.64  # Å; its inverse cube is 0.0207 atoms/Å³
    lattice = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 3)
    displaced = lattice * spacing + np.random.default_rng(0).normal(scale=0.1, size=lattice.shape)
    return displaced, np.eye(3) * n * spacing


def methods(problem: Problem, without: Collection[str] = ()) -> dict[str, Run]:
    """Every method for a problem, compiled and warm: the floor, a Python loop, torchcall, peers."""
    wrapper = torchcall_wrapper(problem)
    tensors = problem.tensors()
    result: dict[str, Run] = {
        FLOOR: script_loop(problem.module, tensors, requires_grad=problem.requires_grad),
        PYTHON: python_loop(problem.module, tensors, requires_grad=problem.requires_grad),
        TORCHCALL: jitted_loop(wrapper, problem.args, lambda: wrapper.stats()["calls"]),
    }
    for name, make in peers(without).items():
        counter = CallCounter()
        call = make(problem.module, counter=counter, **problem.options())
        result[name] = jitted_loop(call, problem.args, lambda counter=counter: counter.calls)
    for run in result.values():
        run(3)
    return result


def torchcall_wrapper(problem: Problem) -> Any:
    """The problem's module as a warmed-up `TorchModuleWrapper`."""
    wrapper = torchcall.TorchModuleWrapper(
        problem.module,
        output_spec=problem.output_spec,
        input_spec=None if problem.input_spec is None else (problem.input_spec, {}),
        requires_grad=problem.requires_grad,
    )
    wrapper.warmup(*problem.args)
    return wrapper


def peers(without: Collection[str] = ()) -> dict[str, Callable[..., Any]]:
    """The available peers, except those left out. Prints why a peer is not available."""
    makers = {BUFFER: buffer_callback_call, WRAP: wrap_torch2jax_call, PURE: pure_callback_call}
    result = {name: make for name, make in makers.items() if name not in without}
    if WRAP not in result:
        return result
    try:
        from wrap_torch2jax import compile_and_import_module

        compile_and_import_module()
    except Exception as error:  # from its compiler or imports: leave out the row and go on
        del result[WRAP]
        print(f"{WRAP} is left out: {str(error).splitlines()[0]}")
    return result


def jitted_loop(
    call: Callable[..., Any], args: tuple[Any, ...], count: Callable[[], int] | None
) -> Run:
    """`run(calls)`: that many calls inside one jitted `fori_loop`.

    Args:
        call: Maps `args` to a pytree of arrays.
        args: Pytrees of arrays; arguments of the jitted function.
        count: How many calls the method has made; None: it cannot tell.

    Raises:
        RuntimeError: If the compiled loop makes another number of calls.
    """

    @jax.jit
    def loop(calls: jax.Array, *args: Any) -> jax.Array:
        def body(_: jax.Array, carry: jax.Array) -> jax.Array:
            operands, carry = jax.lax.optimization_barrier((args, carry))
            first = jax.tree.leaves(call(*operands))[0]
            # 0 × carry uses the barrier's second output, so XLA keeps the calls in order.
            return 0 * carry + first[(0,) * first.ndim].astype(jnp.float32)

        return jax.lax.fori_loop(0, calls, body, jnp.float32(0))

    def run(calls: int) -> float:
        return timed(lambda: loop(calls, *args).block_until_ready())

    run(1)
    before = count() if count else 0
    run(5)
    if count is None:
        return run
    if (made := count() - before) != 5:
        raise RuntimeError(f"torchcall: expected 5 calls of the loop's body, got {made}")
    return run


def python_loop(module: Any, tensors: tuple[Any, ...], *, requires_grad: bool) -> Run:
    """`run(calls)`: the module called from a Python loop."""
    forward = module.forward

    def calls_in_a_row(calls: int) -> None:
        with torch.enable_grad() if requires_grad else torch.inference_mode():
            for _ in range(calls):
                forward(*tensors)

    return lambda calls: timed(lambda: calls_in_a_row(calls))


def memcpy_loop(n_bytes: int) -> Run:
    """`run(calls)`: copies of that many bytes between two buffers."""
    source, target = np.ones(n_bytes, np.uint8), np.ones(n_bytes, np.uint8)

    def copies(calls: int) -> None:
        for _ in range(calls):
            np.copyto(target, source)

    return lambda calls: timed(lambda: copies(calls))


def faster(
    report: Report, case: str, timings: Mapping[str, Timing], limits: Mapping[str, float]
) -> None:
    """Claims that torchcall is faster than each method by at least the factor given."""
    for method, limit in limits.items():
        if method in timings:
            ratio = timings[method].us_median / timings[TORCHCALL].us_median
            report.claim(case, f"{method} / torchcall", ratio, limit, at_most=False)
