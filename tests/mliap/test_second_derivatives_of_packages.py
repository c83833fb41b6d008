"""Second derivatives of `energy` by a package, against those of the eager module."""

from dataclasses import replace

import engines
import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from engines import package  # noqa: F401
from graphs import QUICK
from reference import CUTOFF

from torchcall.mliap import TorchMliap, energy

pytestmark = pytest.mark.usefixtures("x64")


def total(model, graph):
    """The sum of all energies, a function of positions and cells."""

    def of(positions, cell):
        return energy(model, replace(graph, positions=positions, cell=cell)).sum()

    return of


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


@pytest.fixture
def batch():
    """Two systems, with empty slots for edges and padded atoms."""
    members = [reference.systems()[kind] for kind in ("triclinic", "slab")]
    return graphs.shuffled(graphs.atom_graph(members, slots=3), 4, padding=2)[0]


@pytest.fixture
def of_package(package, batch):  # noqa: F811
    return total(TorchMliap.from_package(package), batch)


@pytest.fixture
def of_module(batch):
    return total(TorchMliap.from_energy(engines.Energy(), CUTOFF, engine="eager"), batch)


def assert_equal(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(other).all()
        scale = np.abs(other).max()
        assert scale > 0
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * scale)


def test_a_hessian_of_positions_and_cells_is_the_eager_modules(of_package, of_module, batch):
    found = quick(jax.hessian(of_package, (0, 1)))(batch.positions, batch.cell)
    expected = quick(jax.hessian(of_module, (0, 1)))(batch.positions, batch.cell)
    assert_equal(found, expected)


def test_a_hessian_vector_product_is_one_call_of_the_package(package, of_module, batch):  # noqa: F811
    model = TorchMliap.from_package(package)
    of, random = total(model, batch), np.random.default_rng(0)
    v = jnp.asarray(random.normal(size=batch.positions.shape))

    def product(of, x):
        return jax.jvp(lambda x: jax.grad(of)(x, batch.cell), (x,), (v,))[1]

    program = quick(lambda x: product(of, x)).lower(batch.positions).compile()
    before = model.wrapper.stats()["calls"]
    found = jax.block_until_ready(program(batch.positions))
    assert model.wrapper.stats()["calls"] - before == 1
    assert_equal(found, product(of_module, batch.positions))


def test_products_are_mapped_over_geometries(of_package, of_module, batch):
    moves = np.random.default_rng(1).normal(scale=0.01, size=(2, *batch.positions.shape))

    def penalty(of):
        return lambda x: (jax.grad(of)(x, batch.cell) ** 2).sum()

    several = batch.positions + moves
    found = quick(jax.vmap(jax.grad(penalty(of_package))))(several)
    assert_equal(found, quick(jax.vmap(jax.grad(penalty(of_module))))(several))


def test_third_derivatives_are_an_error_at_trace_time(of_package, batch):
    def slope(t):
        return of_package(batch.positions * t, batch.cell)

    with pytest.raises(NotImplementedError, match="second derivatives of the energy, not further"):
        jax.grad(jax.grad(jax.grad(slope)))(1.0)


def test_a_package_without_second_derivatives_names_the_option(package, batch, tmp_path):  # noqa: F811
    without = engines.changed(package, tmp_path / "m.pt2", gradients=[])
    of = total(TorchMliap.from_package(without), batch)
    jax.grad(of)(batch.positions, batch.cell)
    with pytest.raises(
        NotImplementedError,
        match=r"torchcall: Energy \(m.pt2\): second derivatives: .* got one without; compile it "
        r"again with torchcall.mliap.compile\(..., second_derivatives=True\)",
    ):
        jax.eval_shape(jax.hessian(of), batch.positions, batch.cell)
