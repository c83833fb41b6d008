"""Cost of a call: µs per call inside one jitted loop, for small, structured and large arguments.

    python benchmarks/call_overhead.py --json benchmarks/results/call_overhead.json

The floor is `Module::forward` of the same module in a C++ loop, without XLA, on tensors that
already have the model's dtypes.
"""

import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import torch
from _harness import (
    BUFFER,
    FLOOR,
    MEMCPY,
    PURE,
    TORCHCALL,
    WRAP,
    Problem,
    Report,
    Timing,
    faster,
    graph_problem,
    liquid,
    memcpy_loop,
    methods,
    parser,
)


class Double(torch.nn.Module):
    """`x * 2`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Doubles."""
        return x * 2


class NineToThree(torch.nn.Module):
    """The nine inputs and three outputs of a potential, with almost no work."""

    def forward(self, input: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Doubles three of the inputs."""
        return {
            "energy": input["charge"] * 2,
            "position_gradients": input["pos"] * 2,
            "cell_gradients": input["cell"] * 2,
        }


def double(case: str, elements: int) -> Problem:
    """`x * 2` on float32."""
    x = jnp.zeros(elements, jnp.float32)
    module = torch.jit.script(Double().eval())
    return Problem(case, module, (x,), lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))


def nine_to_three(case: str, *, n_atoms: int, n_edges: int) -> Problem:
    """Nine inputs as one dict, three outputs as another."""
    graph = {
        "pos": jnp.zeros((n_atoms, 3), jnp.float32),
        "atomic_numbers": jnp.zeros(n_atoms, jnp.int32),
        "cell": jnp.zeros((2, 3, 3), jnp.float32),
        "pbc": jnp.ones((2, 3), bool),
        "edge_index": jnp.zeros((2, n_edges), jnp.int32),
        "cell_offsets": jnp.zeros((n_edges, 3), jnp.float32),
        "batch": jnp.zeros(n_atoms, jnp.int32),
        "charge": jnp.zeros(2, jnp.float32),
        "spin": jnp.zeros(2, jnp.float32),
    }

    def outputs(graph: Mapping[str, jax.Array]) -> dict[str, jax.ShapeDtypeStruct]:
        sources = {"energy": "charge", "position_gradients": "pos", "cell_gradients": "cell"}
        return {
            name: jax.ShapeDtypeStruct(graph[source].shape, graph[source].dtype)
            for name, source in sources.items()
        }

    return Problem(case, torch.jit.script(NineToThree().eval()), (graph,), outputs)


def over_floor(report: Report, case: str, timings: Mapping[str, Timing], limit: float) -> None:
    """Claims that torchcall takes at most so many times the floor."""
    ratio = timings[TORCHCALL].us_median / timings[FLOOR].us_median
    report.claim(case, f"{TORCHCALL} / {FLOOR}", ratio, limit)


def main(argv: list[str] | None = None) -> int:
    """Times every case and checks the claims."""
    options = parser(__doc__ or "").parse_args(argv)
    report = Report("Call overhead", options)

    def wanted(case: str) -> bool:
        return options.only in case

    case = "(a) x*2, 300 float32"
    if wanted(case):
        timings = report.time(case, methods(double(case, 300), options.without))
        over_floor(report, case, timings, 1.1)
        faster(report, case, timings, {PURE: 25, BUFFER: 4, WRAP: 4})

    case = "(b) 9 inputs, 3 outputs, dicts, 100 atoms, 3000 edges"
    if wanted(case):
        timings = report.time(
            case, methods(nine_to_three(case, n_atoms=100, n_edges=3000), options.without)
        )
        over_floor(report, case, timings, 1.2)
        faster(report, case, timings, {PURE: 30, BUFFER: 4, WRAP: 4})

    for elements, name in ((300_000, "3e5"), (30_000_000, "3e7")):
        case = f"(c) x*2, {name} float32"
        if not wanted(case):
            continue
        elements = elements // 100 if options.quick else elements
        runs = methods(double(case, elements), options.without) | {
            MEMCPY: memcpy_loop(4 * elements)
        }
        # Each run of the loop touches its result's fresh memory for the first time: with 120 MB
        # that has to be spread over many calls, as it is in a long loop.
        large = elements >= 10_000_000
        timings = report.time(
            case, runs, calls=20 if large else None, most_rounds=9 if large else None
        )
        above = timings[TORCHCALL].us_median - timings[FLOOR].us_median
        copies = above / timings[MEMCPY].us_median
        report.claim(case, f"({TORCHCALL} - {FLOOR}) / {MEMCPY}", copies, 1.2)

    for n_atoms in (64, 125 if options.quick else 1728):
        case = "(d) Lennard-Jones forces"
        if wanted(f"{case}, {n_atoms} atoms"):
            problem = graph_problem(case, *liquid(n_atoms), cutoff=8.5)
            timings = report.time(problem.case, methods(problem, options.without))
            over_floor(report, problem.case, timings, 1.15)

    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
