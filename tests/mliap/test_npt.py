"""Constant-pressure relaxation and a strain scan with a torch potential, against its JAX twin."""

from dataclasses import replace

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from graphs import QUICK
from reference import one_thread  # noqa: F401

from torchcall.mliap import energy

pytestmark = pytest.mark.usefixtures("x64")
PRESSURE = 0.02  # eV/Å³


@pytest.fixture(scope="module")
def model():
    return graphs.potential("Lennard-Jones")


def enthalpies(model):
    """`H = E + P V` of a system at scaled coordinates, by the model and by its twin.

    Edges are listed once, slightly beyond the cutoff, so that pairs may cross the cutoff during a
    short run.
    """
    system = reference.distorted(18)
    graph = graphs.atom_graph([system], reach=reference.CUTOFF + 0.1)
    twin = reference.lennard_jones(system)

    def by_model(frac, cell):
        moved = replace(graph, positions=frac @ cell, cell=cell[None])
        return energy(model, moved)[0] + PRESSURE * jnp.abs(jnp.linalg.det(cell))

    def by_twin(frac, cell):
        return twin(frac @ cell, cell) + PRESSURE * jnp.abs(jnp.linalg.det(cell))

    frac = np.linalg.solve(system.cell.T, system.positions.T).T
    return by_model, by_twin, jnp.asarray(frac), jnp.asarray(system.cell)


def relax(enthalpy, frac, cell, steps=12):
    """Steepest descent of atoms and cell together."""

    def step(state, _):
        value, (by_frac, by_cell) = jax.value_and_grad(enthalpy, (0, 1))(*state)
        frac, cell = state
        return (frac - 2e-5 * by_frac, cell - 2e-4 * by_cell), value

    run = jax.jit(lambda s: jax.lax.scan(step, s, length=steps), compiler_options=QUICK)
    return run((frac, cell))


def test_constant_pressure_relaxation_equals_the_twins(model):
    by_model, by_twin, frac, cell = enthalpies(model)
    before = model.wrapper.stats()["calls"]
    (found_frac, found_cell), found = jax.block_until_ready(relax(by_model, frac, cell))
    assert model.wrapper.stats()["calls"] - before == 12
    (frac, cell), values = relax(by_twin, frac, cell)
    assert (np.diff(values) < 0).all()
    np.testing.assert_allclose(found, values, rtol=1e-11)
    np.testing.assert_allclose(found_frac, frac, rtol=0, atol=1e-11)
    np.testing.assert_allclose(found_cell, cell, rtol=0, atol=1e-11)


def test_strain_scan_is_one_call_and_equals_the_twin(model):
    by_model, by_twin, frac, cell = enthalpies(model)
    strains = np.linspace(-0.01, 0.01, 5)
    shear = np.array([[1.0, 0.3, 0.0], [0.0, 0.5, 0.2], [0.1, 0.0, -0.4]])
    cells = jnp.asarray(np.stack([np.asarray(cell) @ (np.eye(3) + s * shear) for s in strains]))

    def scan(enthalpy):
        differentiate = jax.vmap(jax.value_and_grad(enthalpy, 1), (None, 0))
        return jax.jit(differentiate, compiler_options=QUICK)(frac, cells)

    before = model.wrapper.stats()["calls"]
    found, slopes = jax.block_until_ready(scan(by_model))
    assert model.wrapper.stats()["calls"] - before == 1
    values, expected = scan(by_twin)
    np.testing.assert_allclose(found, values, rtol=1e-12)
    np.testing.assert_allclose(slopes, expected, rtol=0, atol=1e-12 * abs(expected).max())
