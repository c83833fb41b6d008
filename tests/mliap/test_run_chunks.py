"""Long runs: growth in a compressing cell, both schedules, no step lost or repeated."""

import gc
import weakref
from dataclasses import dataclass

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lists import listed

from torchcall.mliap import AtomGraph, RunError, energy, neighbor_list, run_chunks

N, SIDE, CUTOFF = 40, 9.0, 3.0
PBC, BATCH = np.ones((1, 3), bool), np.zeros(N, np.int32)
STEPS = 24


def start(skin):
    positions = np.random.default_rng(0).uniform(0, SIDE, (N, 3)).astype(np.float32)
    cell = np.eye(3, dtype=np.float32)[None] * np.float32(SIDE)
    search = neighbor_list(CUTOFF, skin=skin, capacity_multiplier=1.7)
    nbrs = search.allocate(positions, cell, PBC, BATCH)
    state = {"positions": jnp.asarray(positions), "cell": jnp.asarray(cell), "edges": jnp.int32(0)}
    return state, nbrs


def compress(state, nbrs):
    positions, cell = state["positions"] * 0.99, state["cell"] * 0.99
    nbrs = nbrs.update(positions, cell)
    return {"positions": positions, "cell": cell, "edges": state["edges"] + nbrs.n_edges}, nbrs


@pytest.fixture(scope="module")
def expected():
    """The number of edges summed over all steps, by vesin."""
    state, _ = start(0.0)
    positions, cell = np.asarray(state["positions"]), np.asarray(state["cell"])
    edges = 0
    for _ in range(STEPS):
        positions, cell = positions * np.float32(0.99), cell * np.float32(0.99)
        edges += len(listed(positions, cell, PBC, BATCH, CUTOFF))
    return edges


@pytest.mark.parametrize("schedule", ["when-needed", "static"])
def test_a_compressing_cell_grows_the_list_and_loses_no_edges(schedule, expected):
    seen, traces = [], []

    def step(state, nbrs):
        traces.append(nbrs.layout)
        return compress(state, nbrs)

    state, nbrs = start(0.6)
    first = nbrs.layout
    state, nbrs = run_chunks(
        step,
        state,
        nbrs,
        STEPS,
        chunk=STEPS // 2,
        schedule=schedule,
        rebuild_every=4,
        progress=lambda done, *_: seen.append(done),
    )
    assert seen == [STEPS // 2, STEPS]
    assert int(state["edges"]) == expected
    assert nbrs.layout.edges > first.edges
    assert not bool(nbrs.did_overflow)
    # One compilation for the first list and for each growth.
    assert traces[0] == first
    assert len(traces) == len(set(traces))
    assert [layout.edges for layout in traces] == sorted({layout.edges for layout in traces})


def test_non_finite_positions_end_the_run_with_the_last_good_state():
    def step(state, nbrs):
        count = state["edges"] + 1
        positions = jnp.where(count > 7, jnp.float32(jnp.nan), state["positions"])
        return {**state, "positions": positions, "edges": count}, nbrs.update(
            positions, state["cell"]
        )

    state, nbrs = start(0.0)
    with pytest.raises(
        RunError, match=r"^torchcall: run_chunks: between steps 5 and 10: .*finite"
    ) as caught:
        run_chunks(step, state, nbrs, 20, chunk=5)
    assert caught.value.done == 5
    assert int(caught.value.state["edges"]) == 5


def test_bad_arguments_are_refused():
    state, nbrs = start(0.0)
    with pytest.raises(ValueError, match=r"schedule: expected a list with a skin"):
        run_chunks(compress, state, nbrs, 4, schedule="static")
    with pytest.raises(ValueError, match=r"schedule: expected .*got 'often'"):
        run_chunks(compress, state, nbrs, 4, schedule="often")
    with pytest.raises(ValueError, match=r"chunk: expected at least 1, got 0"):
        run_chunks(compress, state, nbrs, 4, chunk=0)
    with pytest.raises(TypeError, match=r"step: expected \(state, NeighborList\)"):
        run_chunks(lambda state, _: state, state, nbrs, 4)


def test_list_grows_to_fit_alternating_cells():
    sides = [[4.0, 12.0, 12.0], [12.0, 4.0, 12.0]]
    cells = jnp.asarray([np.diag(side) for side in sides], jnp.float32)
    fractions = jnp.asarray(np.random.default_rng(0).random((30, 3)), jnp.float32)
    batch = np.zeros(30, np.int32)
    nbrs = neighbor_list(5.0).allocate(fractions @ cells[0], cells[:1], PBC, batch)

    def step(k, nbrs):
        cell = cells[k % 2]
        return k + 1, nbrs.update(fractions @ cell, cell[None])

    done, nbrs = run_chunks(step, jnp.int32(1), nbrs, 5, chunk=1)
    assert int(done) == 6
    assert not bool(nbrs.did_overflow)


@pytest.mark.parametrize("name", ["n_steps", "chunk", "rebuild_every"])
@pytest.mark.parametrize("value", [2.5, "5", True])
def test_counts_that_are_not_ints_are_refused(name, value):
    state, nbrs = start(0.0)
    arguments = {"n_steps": 4, name: value}
    with pytest.raises(TypeError, match=f"^torchcall: run_chunks: {name}: expected an int, got"):
        run_chunks(compress, state, nbrs, **arguments)


def test_a_list_of_non_finite_positions_is_refused():
    state, nbrs = start(0.0)
    update = jax.jit(lambda nbrs, positions, cell: nbrs.update(positions, cell))
    lost = update(nbrs, np.full((N, 3), np.nan, np.float32), state["cell"])
    with pytest.raises(RunError, match=r"^torchcall: run_chunks: positions or cell are not finite"):
        run_chunks(compress, state, lost, 4)
    with pytest.raises(ValueError, match=r"^torchcall: NeighborList.grow: positions: expected fin"):
        lost.grow()


def still(state, nbrs):
    return state, nbrs.update(state["positions"], state["cell"])


@pytest.mark.parametrize("schedule", ["when-needed", "static"])
def test_a_step_is_compiled_once(schedule):
    traces = []

    def step(state, nbrs):
        traces.append(nbrs.layout)
        return still(state, nbrs)

    state, nbrs = start(0.6)
    options = {"schedule": schedule, "rebuild_every": 2}
    for _ in range(3):
        run_chunks(step, state, nbrs, 8, chunk=4, **options)
    assert len(traces) == 1
    # With a condition, one program serves chunks of any length.
    run_chunks(step, state, nbrs, 7, chunk=5, **options)
    assert len(traces) == 1 or schedule == "static"
    run_chunks(lambda *carry: step(*carry), state, nbrs, 8, chunk=4, **options)
    assert len(traces) > 1


@dataclass
class Simulation:
    """Neither it nor its method is hashable."""

    traces: int = 0

    def step(self, state, nbrs):
        self.traces += 1
        return still(state, nbrs)

    __call__ = step


class Slotted:
    """Cannot be referenced weakly."""

    __slots__ = ("traces",)

    def __init__(self):
        self.traces = 0

    __call__ = Simulation.step


@pytest.mark.parametrize(
    "of, compiled",
    [
        (lambda simulation: simulation.step, 1),
        (lambda simulation: simulation, 1),
        (lambda simulation: jax.jit(simulation.step), 2),
        (lambda _: Slotted(), 0),
    ],
    ids=["method", "object", "jitted", "slotted object"],
)
def test_any_callable_is_a_step(of, compiled):
    state, nbrs = start(0.0)
    simulation = Simulation()
    for _ in range(2):
        out, _ = run_chunks(of(simulation), state, nbrs, 2)
    np.testing.assert_array_equal(out["positions"], state["positions"])
    assert simulation.traces <= compiled


def test_programs_do_not_outlive_their_step():
    state, nbrs = start(0.0)

    def made(weight):
        def step(state, nbrs):
            return {**state, "positions": state["positions"] + 0 * weight[0]}, still(state, nbrs)[1]

        return step

    weight, simulation = np.ones(1000, np.float32), Simulation()
    step = made(weight)
    run_chunks(step, state, nbrs, 2)
    run_chunks(simulation.step, state, nbrs, 2)
    gone = [weakref.ref(owner) for owner in (weight, step, simulation)]
    del weight, step, simulation
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3


@pytest.mark.usefixtures("x64")
def test_a_chunk_whose_energies_were_nan_is_repeated_with_room():
    """Atoms follow their gradients, so an overflow within a chunk makes all that follows NaN."""
    model = graphs.potential("Lennard-Jones")
    numbers, batch = jnp.full(27, 18, jnp.int32), np.zeros(27, np.int32)
    grid = np.stack(np.meshgrid(*[range(3)] * 3), -1).reshape(-1, 3)
    fractions = jnp.asarray((grid + 0.01 * np.random.default_rng(0).random((27, 3))) / 3)

    def step(state, nbrs):
        positions, cell = state["positions"] * 0.98, state["cell"] * 0.98
        nbrs = nbrs.update(positions, cell)

        def total(x):
            return energy(model, AtomGraph.from_neighbors(nbrs, x, cell, numbers)).sum()

        value, gradients = jax.value_and_grad(total)(positions)
        positions = positions - 1e-4 * gradients
        bad = state["bad"] | jnp.isnan(value)
        return {"positions": positions, "cell": cell, "energy": value, "bad": bad}, nbrs

    ends, lists = [], []
    for multiplier in (1.0, 9.0):
        cell = 9.3 * jnp.eye(3)[None]
        search = neighbor_list(graphs.CUTOFF, capacity_multiplier=multiplier)
        first = search.allocate(fractions @ cell[0], cell, PBC, batch)
        state = {
            "positions": fractions @ cell[0],
            "cell": cell,
            "energy": jnp.zeros(()),
            "bad": jnp.asarray(False),
        }
        end, nbrs = run_chunks(step, state, first, 12, chunk=6)
        ends.append(end)
        lists.append((first.layout.edges, nbrs.layout.edges))
    assert lists[0][1] > lists[0][0]
    assert lists[1][1] == lists[1][0]
    assert not ends[0]["bad"]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), *ends)


def test_a_collapsed_cell_ends_the_run_with_the_last_good_state():
    def step(state, nbrs):
        count = state["edges"] + 1
        cell = jnp.where(count > 7, state["cell"] / 1e4, state["cell"])
        return {**state, "edges": count}, nbrs.update(state["positions"], cell)

    state, nbrs = start(0.0)
    with pytest.raises(
        RunError, match=r"between steps 5 and 10: the cell has shrunk.*at most 400 times"
    ) as caught:
        run_chunks(step, state, nbrs, 20, chunk=5)
    assert caught.value.done == 5
    assert int(caught.value.state["edges"]) == 5


def test_run_chunks_names_a_wrong_step_and_traced_or_mapped_lists():
    state, nbrs = start(0.0)
    wrong: object = None
    with pytest.raises(
        TypeError, match=r"^torchcall: run_chunks: step: expected a function, got N"
    ):
        run_chunks(wrong, state, nbrs, 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"^torchcall: run_chunks: expected a concrete list"):
        jax.jit(lambda nbrs: run_chunks(compress, state, nbrs, 1))(nbrs)
    mapped = jax.vmap(lambda x: nbrs.update(x, state["cell"]))(state["positions"][None])
    with pytest.raises(ValueError, match=r"^torchcall: run_chunks: expected one list, got \(1,\)"):
        run_chunks(compress, state, mapped, 1)
