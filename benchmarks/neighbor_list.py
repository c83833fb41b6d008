"""Neighbour lists of 1k to 100k atoms: a search and a step, beside jax-md, vesin and matscipy.

Every JAX method runs inside one jitted `fori_loop` whose operands are arguments; atoms drift a
little in each iteration, so that none is the same as the one before. vesin and matscipy are called
from Python with a float64 copy of the positions, as their interfaces want.
"""

import argparse
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matscipy.neighbours
import numpy as np
import vesin
from _record import record

from torchcall.demo._timing import Run, Timing, interleave, machine, timed, versions
from torchcall.mliap import NeighborList, neighbor_list

CUTOFF, SKIN = 5.0, 0.5
DENSITY = 0.05  # atoms/Å³, silicon's
SEARCH, STEP = "torchcall, search", "torchcall, step with skin"
PEER_SEARCH, PEER_STEP = "jax-md, search", "jax-md, step with skin"
VESIN, MATSCIPY = "vesin, search", "matscipy, search"
# As in a liquid with steps of 2 fs: the skin is used up after about 15 steps.
RUN, PEER_RUN = "torchcall, 15 steps a search", "jax-md, 15 steps a search"
FORCES, PEER_FORCES = "torchcall, step and forces", "jax-md, step and forces"
# What a row is compared with.
BASES = {
    STEP: STEP,
    PEER_STEP: STEP,
    RUN: RUN,
    PEER_RUN: RUN,
    FORCES: FORCES,
    PEER_FORCES: FORCES,
}


def disordered(n_atoms: int) -> tuple[np.ndarray, float]:
    """Positions (N, 3), float32, and the side of a cube: a shaken simple lattice, in Å."""
    side = (n_atoms / DENSITY) ** (1 / 3)
    n = math.ceil(n_atoms ** (1 / 3))
    lattice = np.stack(np.meshgrid(*[np.arange(n)] * 3, indexing="ij"), -1).reshape(-1, 3)[:n_atoms]
    shaken = lattice + 0.5 + np.random.default_rng(0).uniform(-0.25, 0.25, lattice.shape)
    return (shaken * side / n).astype(np.float32), side


def allocate(positions: np.ndarray, side: float, skin: float) -> NeighborList:
    """This project's list of one cubic periodic system."""
    cell = np.eye(3, dtype=np.float32)[None] * np.float32(side)
    batch = np.zeros(len(positions), np.int32)
    return neighbor_list(CUTOFF, skin=skin).allocate(positions, cell, np.ones((1, 3), bool), batch)


def loop(update: Callable[[Any, Any], Any], positions: np.ndarray, nbrs: Any, drift: float) -> Run:
    """`run(calls)`: that many updates in one jitted loop, positions drifting by `drift` Å each."""

    @jax.jit
    def updates(calls: jax.Array, positions: jax.Array, nbrs: Any) -> Any:
        def body(_: jax.Array, carry: Any) -> Any:
            positions, nbrs = carry
            positions = positions + jnp.float32(drift)
            return positions, update(nbrs, positions)

        return jax.lax.fori_loop(0, calls, body, (positions, nbrs))

    start = jnp.asarray(positions)
    return lambda calls: timed(lambda: jax.block_until_ready(updates(calls, start, nbrs)))


def jax_md_lists(positions: np.ndarray, side: float) -> list[Any]:
    """jax-md's list of one cubic periodic system, without and with a skin."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from jax_md import partition, space
    box: Any = side
    displacement, _ = space.periodic(box)
    new_list: Any = partition.neighbor_list
    return [
        new_list(
            displacement, box, CUTOFF, skin, format=partition.NeighborListFormat.Sparse
        ).allocate(positions)
        for skin in (0.0, SKIN)
    ]


def fifteenths(run: Run) -> Run:
    """A fifteenth of the time of 15 times as many calls."""
    return lambda calls: run(15 * calls) / 15


def soft_forces(
    positions: jax.Array, sender: jax.Array, receiver: jax.Array, shift: jax.Array | None, side: Any
) -> jax.Array:
    """Gradients of `Σ (1 − r/cutoff)²` over a list's pairs within the cutoff, (N, 3).

    What is done with a list in a step: gather both ends, a pair function, add up by sender. A pair
    beyond the cutoff is masked. Without shifts the nearest image is taken.
    """
    take = {"mode": "fill", "fill_value": 0.0}
    r = positions.at[receiver].get(**take) - positions.at[sender].get(**take)
    r = r - side * jnp.round(r / side) if shift is None else r + shift * side
    square = jnp.sum(r * r, axis=-1)
    inside = (square > 0) & (square < CUTOFF**2) & (sender < len(positions))
    length = jnp.sqrt(jnp.where(inside, square, 1))
    pull = jnp.where(inside, (1 - length / CUTOFF) / length, 0)
    return jnp.zeros_like(positions).at[sender].add(pull[:, None] * r, mode="drop")


def methods(n_atoms: int, *, jax_md: bool = True) -> dict[str, Run]:
    """Every method for one system, compiled and warm; those of jax-md only if asked for."""
    positions, side = disordered(n_atoms)
    plain, skinned = allocate(positions, side, 0.0), allocate(positions, side, SKIN)
    search = vesin.NeighborList(cutoff=CUTOFF, full_list=True, sorted=True)
    lattice = np.eye(3) * side
    search.compute(positions.astype(float), lattice, True, "ijS", copy=False)

    width = np.float32(side)

    def our_forces(state: Any, x: jax.Array) -> Any:
        nbrs = state[0].update(x, state[0].cell)
        sender, receiver = nbrs.edge_index
        return nbrs, soft_forces(x, sender, receiver, nbrs.cell_offsets, width)

    def their_forces(state: Any, x: jax.Array) -> Any:
        nbrs = state[0].update(x)
        sender, receiver = nbrs.idx
        return nbrs, soft_forces(x, sender, receiver, None, width)

    nothing = jnp.zeros_like(positions)

    def vesin_calls(calls: int) -> None:
        for _ in range(calls):
            search.compute(positions.astype(float), lattice, True, "ijS", copy=False)

    def matscipy_search(quantities: str) -> Any:
        return matscipy.neighbours.neighbour_list(
            quantities,
            positions=positions.astype(float),
            cell=lattice,
            pbc=[True] * 3,
            cutoff=CUTOFF,
        )

    def matscipy_calls(calls: int) -> None:
        for _ in range(calls):
            matscipy_search("ijS")

    result: dict[str, Run] = {
        SEARCH: loop(lambda n, x: n.update(x, n.cell), positions, plain, 1e-4),
        VESIN: lambda calls: timed(lambda: vesin_calls(calls)),
        MATSCIPY: lambda calls: timed(lambda: matscipy_calls(calls)),
        STEP: loop(lambda n, x: n.update(x, n.cell), positions, skinned, 1e-7),
        RUN: fifteenths(loop(lambda n, x: n.update(x, n.cell), positions, skinned, 0.0096)),
        FORCES: loop(our_forces, positions, (skinned, nothing), 1e-7),
    }
    counts = {
        "torchcall": int(plain.n_edges),
        "vesin": len(search.compute(positions.astype(float), lattice, True, "i")[0]),
        "matscipy": len(matscipy_search("i")),
    }
    if jax_md:
        theirs, theirs_skinned = jax_md_lists(positions, side)
        update = lambda n, x: n.update(x)  # noqa: E731
        result |= {
            PEER_SEARCH: loop(update, positions, theirs, 1e-4),
            PEER_STEP: loop(update, positions, theirs_skinned, 1e-7),
            PEER_RUN: fifteenths(loop(update, positions, theirs_skinned, 0.0096)),
            PEER_FORCES: loop(their_forces, positions, (theirs_skinned, nothing), 1e-7),
        }
        counts["jax-md"] = int((theirs.idx[0] < n_atoms).sum())
    print(f"\n{n_atoms} atoms; pairs found: {counts}")
    for run in result.values():
        run(1)
    return result


def peak_memory(n_atoms: int) -> float:
    """Peak resident memory of a fresh process that allocates and updates one list, in MiB."""
    command = [sys.executable, __file__, "--memory-of", str(n_atoms)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def print_peak(n_atoms: int) -> None:
    """The child process of `peak_memory`."""
    nbrs = allocate(*disordered(n_atoms), SKIN) if n_atoms else None
    if nbrs is not None:
        jax.block_until_ready(jax.jit(lambda n: n.update(n.positions, n.cell))(nbrs))
    # Not `getrusage`, whose peak a child takes over from its parent.
    status = Path("/proc/self/status").read_text()
    print(int(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) / 1024)


def report(case: str, timings: dict[str, Timing], rows: list[dict[str, object]]) -> None:
    """Prints a case's table and adds its rows."""
    print(f"  {'method':<28}{'µs':>14}{'± IQR':>12}{'vs torchcall':>14}")
    for name, timing in timings.items():
        ratio = f"{timing.us_median / timings[BASES.get(name, SEARCH)].us_median:.2f}"
        print(f"  {name:<28}{timing.us_median:>14.1f}{timing.us_iqr:>12.1f}{ratio:>14}")
        rows.append(
            {
                "case": case,
                "method": name,
                "engine": name.split(",")[0] if name in (VESIN, MATSCIPY) else "XLA",
                "us_median": timing.us_median,
                "us_iqr": timing.us_iqr,
                "n": timing.n,
            }
        )
    print(end="", flush=True)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--atoms", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=7, help="turns of each method (default: 7)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn")
    parser.add_argument("--without", choices=["jax-md"], help="leave out a package's methods")
    parser.add_argument("--memory-of", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of is not None:
        print_peak(options.memory_of)
        return 0
    peers = [name for name in ("jax-md", "vesin", "matscipy") if name != options.without]
    found = versions() | {name: version(name) for name in peers}
    where = machine()
    print(f"{where['cpu']}, {where['cores']} cores, {where['os']}; float32, {CUTOFF} Å + {SKIN} Å")
    print("  ".join(f"{name} {number}" for name, number in found.items()))
    rows: list[dict[str, object]] = []
    medians: dict[str, list[float]] = {}
    for n_atoms in options.atoms:
        found_methods = methods(n_atoms, jax_md="jax-md" in peers)
        timings = interleave(found_methods, rounds=options.rounds, seconds=options.seconds)
        report(f"{n_atoms} atoms", timings, rows)
        for name, timing in timings.items():
            medians.setdefault(name, []).append(timing.us_median)
    if len(options.atoms) > 1:
        print("\nexponent of the cost in the number of atoms, fitted over all sizes")
        for name, values in medians.items():
            print(f"  {name:<28}{np.polyfit(np.log(options.atoms), np.log(values), 1)[0]:>14.2f}")
    base, peak = peak_memory(0), peak_memory(max(options.atoms))
    print(
        f"\npeak memory of {max(options.atoms)} atoms: {peak:.0f} MiB, of a bare process {base:.0f}"
    )
    if options.json is not None:
        largest = f"peak MiB, {max(options.atoms)} atoms"
        record(options.json, rows, found={largest: round(peak), "peak MiB, bare": round(base)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
