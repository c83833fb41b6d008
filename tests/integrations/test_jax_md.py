"""`torchcall.integrations.jax_md` against jax-md's own Lennard-Jones potential."""

import jax
import jax.numpy as jnp
import numpy as np
import pair_potential
import pytest
from jax_md import energy as energies
from jax_md import minimize, partition, quantity, simulate, space

from torchcall.integrations.jax_md import energy_fn, neighbor_fn

pytestmark = [
    pytest.mark.usefixtures("x64", "jax_md_promotion"),
    # jax-md's own lists, with 64-bit types.
    pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning"),
]
SIDE = 11.2  # Å
BOXES = {
    "scalar": SIDE,
    "vector": np.array([SIDE, SIDE + 0.3, SIDE - 0.2]),
    "matrix": np.array([[SIDE, 0.8, -0.5], [0, SIDE + 0.3, 0.6], [0, 0, SIDE - 0.2]]),
}
FORMATS = [partition.Dense, partition.Sparse, partition.OrderedSparse]
MASS, KT, DT = 4.0, 0.004, 0.02


@pytest.fixture
def jax_md_promotion():
    """jax-md mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model():
    with jax.enable_x64(True):
        return pair_potential.potential()


@pytest.fixture(scope="module")
def frac():
    return pair_potential.fractional_argon()


def real(box, frac):
    return np.asarray(space.raw_transform(np.asarray(box), frac))


def ours(model, frac, box, fractional=True):
    """Positions, energy function and list of torchcall."""
    position = jnp.asarray(frac if fractional else real(box, frac))
    energy = energy_fn(model, np.full(len(frac), 18), box, fractional_coordinates=fractional)
    lists = neighbor_fn(model, box, fractional_coordinates=fractional, dr_threshold=0.3)
    return position, energy, lists.allocate(position)


def theirs(position, box, fractional=True, **options):
    """Energy function, list and `shift_fn` of jax-md."""
    displacement, shift = space.periodic_general(box, fractional_coordinates=fractional)
    lists, energy = reference(displacement, box, fractional=fractional, **options)
    return energy, lists.allocate(position), shift


def reference(displacement, box, *, fractional, format=partition.Sparse, skin=0.3):
    """jax-md's own list and energy function."""
    return energies.lennard_jones_neighbor_list(
        displacement,
        box,
        sigma=pair_potential.SIGMA,
        epsilon=pair_potential.EPSILON,
        r_onset=pair_potential.ONSET / pair_potential.SIGMA,
        r_cutoff=pair_potential.CUTOFF / pair_potential.SIGMA,
        dr_threshold=skin,
        fractional_coordinates=fractional,
        format=format,
        disable_cell_list=True,
    )


def observables(energy, box):
    def compute(position, neighbor):
        value, slope = jax.value_and_grad(energy)(position, neighbor)
        pressure = quantity.pressure(energy, position, box, neighbor=neighbor)
        return value, -slope, pressure, quantity.stress(energy, position, box, neighbor=neighbor)

    return jax.jit(compute)


def assert_close(found, expected, rtol=1e-11):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(1, np.abs(b).max()))


@pytest.mark.parametrize(
    "kind, fractional, format",
    [
        ("scalar", True, partition.OrderedSparse),
        ("vector", False, partition.Sparse),
        ("matrix", True, partition.Dense),
    ],
    ids=["scalar, fractional, ordered", "vector, real, sparse", "matrix, fractional, dense"],
)
def test_energy_forces_pressure_and_stress_equal_jax_mds(model, frac, kind, fractional, format):
    box = BOXES[kind]
    position, energy, neighbor = ours(model, frac, box, fractional)
    reference, their_list, _ = theirs(position, box, fractional, format=format)
    expected = observables(reference, box)(position, their_list)
    assert np.abs(expected[1]).max() > 0.01
    for list_ in (neighbor, their_list):
        assert_close(observables(energy, box)(position, list_), expected)


def test_forms_of_a_box_and_of_positions_agree(model, frac):
    found = []
    for box in (SIDE, np.full(3, SIDE, np.float32), SIDE * np.eye(3)):
        for fractional in (True, False):
            position, energy, neighbor = ours(model, frac, box, fractional)
            found.append(jax.value_and_grad(energy)(position, neighbor))
            # A box that is traced, and another one than at the allocation.
            grown = jax.jit(lambda b, e=energy, p=position, n=neighbor: e(p, n, box=b))
            moved = real(1.01 * box, frac) if not fractional else position
            expected = energy(jnp.asarray(moved), neighbor, box=np.asarray(box) * 1.01)
            if fractional:
                assert_close(grown(jnp.asarray(box) * 1.01), expected)
    for other in found[1:]:
        assert_close(other, found[0], rtol=1e-6)  # the side in single precision


def simulated(apply, state, neighbor, steps, *, changes_box=False):
    """jax-md's usual loop, as one program."""

    def body(_, carry):
        state, neighbor = carry
        state = apply(state, neighbor=neighbor)
        box = {"box": simulate.npt_box(state)} if changes_box else {}
        return state, neighbor.update(state.position, **box)

    run = jax.jit(lambda *carry: jax.lax.fori_loop(0, steps, body, carry))
    return jax.block_until_ready(run(state, neighbor))


def both(model, frac, make, *, steps, **start):
    """A simulation with jax-md's energy function and with ours; evaluations of our model.

    Returns:
        Twice energy function, states before and after, and list; and the evaluations.
    """
    box = start.get("box", SIDE)
    position, energy, neighbor = ours(model, frac, box)
    reference, their_list, shift = theirs(position, box)
    start = {"mass": MASS} | start
    ends = []
    for function, list_ in ((reference, their_list), (energy, neighbor)):
        init, apply = make(function, shift)
        key = () if make is minimise else (jax.random.key(7),)
        state = jax.block_until_ready(jax.jit(init)(*key, position, neighbor=list_, **start))
        before = model.wrapper.stats()["calls"]
        end, last = simulated(apply, state, list_, steps, changes_box="box" in start)
        assert not last.did_buffer_overflow
        ends.append((function, (state, end), last))
    return *ends, model.wrapper.stats()["calls"] - before


def minimise(energy, shift):
    return minimize.fire_descent(energy, shift, dt_start=0.02, dt_max=0.1)


def same_trajectory(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10)


def test_nve_follows_jax_mds_trajectory_and_conserves_energy(model, frac):
    reference, found, calls = both(
        model, frac, lambda e, s: simulate.nve(e, s, DT), steps=60, kT=KT
    )
    same_trajectory(found[1][1], reference[1][1])
    assert calls == 60
    energy, states, neighbor = found
    totals = [simulate.kinetic_energy(s) + energy(s.position, neighbor) for s in states]
    kinetic = [simulate.kinetic_energy(s) for s in states]
    assert abs(totals[1] - totals[0]) < 1e-3 * abs(kinetic[1] - kinetic[0])


def test_nose_hoover_follows_jax_mds_trajectory_and_conserves_its_invariant(model, frac):
    def make(energy, shift):
        return simulate.nvt_nose_hoover(energy, shift, DT, KT, tau=20 * DT)

    reference, found, calls = both(model, frac, make, steps=60)
    same_trajectory(found[1][1], reference[1][1])
    assert calls == 60
    energy, states, neighbor = found
    invariant = jax.jit(
        lambda s: simulate.nvt_nose_hoover_invariant(energy, s, KT, neighbor=neighbor)
    )
    invariants = [invariant(s) for s in states]
    kinetic = [simulate.kinetic_energy(s) for s in states]
    assert abs(invariants[1] - invariants[0]) < 1e-3 * abs(kinetic[1] - kinetic[0])


def test_langevin_follows_jax_mds_trajectory(model, frac):
    def make(energy, shift):
        return simulate.nvt_langevin(energy, shift, DT, KT, gamma=0.2)

    reference, found, calls = both(model, frac, make, steps=30)
    same_trajectory(found[1][1].position, reference[1][1].position)
    assert calls == 30


def test_fire_descent_finds_jax_mds_minimum(model, frac):
    reference, found, calls = both(model, frac, minimise, steps=60)
    same_trajectory(found[1][1], reference[1][1])
    assert calls == 60
    first, last = (np.abs(state.force).max() for state in found[1])
    assert last < 0.2 * first


def test_npt_follows_jax_mds_trajectory_and_its_invariant(model, frac):
    pressure = 0.0

    def make(energy, shift):
        return simulate.npt_nose_hoover(energy, shift, DT, pressure, KT)

    def invariants(energy, states, neighbor):
        def one(state):
            list_ = neighbor.update(state.position, box=simulate.npt_box(state))
            return simulate.npt_nose_hoover_invariant(energy, state, pressure, KT, neighbor=list_)

        return jax.lax.map(one, jax.tree.map(lambda *x: jnp.stack(x), *states))

    box = jnp.asarray(BOXES["matrix"])
    reference, found, calls = both(model, frac, make, steps=60, box=box)
    same_trajectory(found[1][1], reference[1][1])
    # One for a step: its box derivative is that of the step before. One for the first.
    assert calls == 61
    start, end = found[1]
    before, after = jax.jit(invariants, static_argnums=0)(*found)
    theirs = jax.jit(invariants, static_argnums=0)(*reference)
    np.testing.assert_allclose(after, theirs[1], rtol=1e-9)
    # With jax-md's own potential, too, it drifts in proportion to the change of the box.
    kinetic = [simulate.kinetic_energy(state) for state in (start, end)]
    assert abs(after - before) < 2e-3 * max(kinetic)


def test_pressure_is_the_derivative_of_the_energy_by_volume(model, frac):
    box, step = BOXES["matrix"], 1e-5
    position, energy, neighbor = ours(model, frac, box)
    values = [energy(position, neighbor, box=np.cbrt(1 + s) * box) for s in (step, -step)]
    by_volume = (values[0] - values[1]) / (2 * step * np.linalg.det(box))
    found = quantity.pressure(energy, position, box, neighbor=neighbor)
    np.testing.assert_allclose(found, -by_volume, rtol=1e-6)
    # A finite perturbation is the same change.
    perturbed = energy(position, neighbor, perturbation=np.cbrt(1 + step))
    np.testing.assert_allclose(perturbed, values[0], rtol=1e-12)


def test_a_box_smaller_than_twice_the_cutoff(model):
    small, side = pair_potential.fractional_argon(1, 0.02), SIDE / 2
    corners = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 1, 3)
    large = (corners + small).reshape(-1, 3) / 2
    position, energy, neighbor = ours(model, small, side)
    expected_position, reference, list_ = ours(model, large, 2 * side)
    found = energy(position, neighbor)
    np.testing.assert_allclose(8 * found, reference(expected_position, list_), rtol=1e-12)
    # jax-md's lists have the nearest image only.
    _, nearest, _ = theirs(position, side)
    assert np.isnan(energy(position, nearest))


def test_open_boundaries(model, frac):
    cluster = jnp.asarray(real(SIDE, frac))
    energy = energy_fn(model, np.full(len(frac), 18), None, fractional_coordinates=False)
    lists = neighbor_fn(model, None, fractional_coordinates=False)
    # The cluster alone in a large box.
    position, reference, list_ = ours(model, np.asarray(cluster) / 50, 50.0)
    found = jax.value_and_grad(energy)(cluster, lists.allocate(cluster))
    assert_close(found, jax.value_and_grad(reference)(position, list_))


def test_an_overflowed_list_gives_nan_until_another_is_allocated(model, frac):
    box = 2 * SIDE
    position, energy, neighbor = ours(model, frac, box)
    dense = position / 1.7
    compute = jax.jit(jax.value_and_grad(energy))
    _, their_list, _ = theirs(position, box)
    for list_ in (neighbor, neighbor.update(dense), their_list.update(dense)):
        value, slope = compute(dense, list_)
        assert np.isnan(value)
        assert np.isnan(slope).all()
    lists = neighbor.made_by
    assert np.isfinite(compute(dense, lists.allocate(dense))[0])
    roomy = lists.update(dense, lists.allocate(position, extra_capacity=60))
    assert not roomy.did_buffer_overflow


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        (lambda e, p, _: e(p), TypeError, "neighbor: expected a list from .*, got none"),
        (lambda e, p, n: e(p, n.edges), TypeError, "neighbor: expected a list from"),
        (lambda e, p, n: e(p[:-1], n), ValueError, r"expected shape \(32, 3\), got \(31, 3\)"),
        (lambda e, p, n: e(p, n, box=jnp.ones(2)), ValueError, r"box: expected a scalar, \(3,\)"),
        (
            lambda e, p, n: e(p, n, perturbation=jnp.ones((2, 2))),
            ValueError,
            "perturbation: expected a scalar",
        ),
        (lambda e, p, n: e(p.astype(int), n), TypeError, "expected float32 or float64"),
    ],
)
def test_wrong_arguments_of_the_energy_get_clear_errors(model, frac, wrong, error, message):
    position, energy, neighbor = ours(model, frac, SIDE)
    with pytest.raises(error, match=f"torchcall: .*{message}"):
        wrong(energy, position, neighbor)


def test_wrong_settings_get_clear_errors(model):
    with pytest.raises(TypeError, match="model: expected a TorchMliap, got a str"):
        energy_fn("7net-0", [18], SIDE, fractional_coordinates=True)
    with pytest.raises(TypeError, match="atomic_numbers: expected integers"):
        energy_fn(model, [18.0], SIDE, fractional_coordinates=True)
    with pytest.raises(ValueError, match="expected a box for fractional coordinates, got None"):
        energy_fn(model, [18], None, fractional_coordinates=True)
    with pytest.raises(ValueError, match="expected a box for fractional coordinates, got None"):
        neighbor_fn(model, None, fractional_coordinates=True)


def test_the_documented_example_runs(model):
    names = {"model": model}
    exec(pair_potential.documented("jax_md"), names)
    state, neighbor = names["new_state"], names["new_neighbor"]
    assert np.isfinite(state.force).all()
    assert np.isfinite(names["pressure"])
    assert not neighbor.did_buffer_overflow


def test_a_model_without_cell_gradients_serves_forces_only(model, frac):
    bare = pair_potential.without_cell_gradients()
    position, energy, neighbor = ours(bare, frac, SIDE)
    _, full, _ = ours(model, frac, SIDE)
    assert_close(jax.grad(energy)(position, neighbor), jax.grad(full)(position, neighbor))
    with pytest.raises(ValueError, match="expected a model with compute_cell_gradients=True"):
        quantity.pressure(energy, position, SIDE, neighbor=neighbor)
