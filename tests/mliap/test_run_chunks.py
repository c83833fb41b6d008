"""Long runs: growth in a compressing cell, both schedules, no step lost or repeated."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lists import listed

from torchcall.mliap import RunError, neighbor_list, run_chunks

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
    # One abstract evaluation, then one compilation for the first list and for each growth.
    compiled = traces[1:]
    assert compiled[0] == first
    assert len(compiled) == len(set(compiled))
    assert [layout.edges for layout in compiled] == sorted({layout.edges for layout in compiled})


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
