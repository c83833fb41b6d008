"""Second derivatives of `energy` under `vmap`: mapped graphs are one call."""

import gc
import weakref
from dataclasses import replace

import example_energies
import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from graphs import QUICK
from jax.experimental import checkify
from reference import one_thread  # noqa: F401

from torchcall.mliap import TorchMliap, energy

pytestmark = pytest.mark.usefixtures("x64")
NAME = "Stillinger-Weber"


@pytest.fixture(scope="module")
def model():
    return example_energies.potential(NAME, "script")[0]


@pytest.fixture(scope="module")
def cases():
    """Three geometries of two systems in a graph, and tangents of positions and cells."""
    members = [reference.systems()[kind] for kind in ("triclinic", "slab")]
    generator = np.random.default_rng(0)
    with jax.enable_x64(True):
        graph = graphs.atom_graph(members, slots=3)
        noise = generator.normal(scale=0.02, size=(3, *graph.positions.shape))
        several = jax.tree.map(lambda x: jnp.stack([x] * 3), graph)
        several = replace(several, positions=several.positions + noise)
        moves = jnp.asarray(generator.normal(size=noise.shape))
        strains = jnp.asarray(generator.normal(size=several.cell.shape))
    return graph, several, moves, strains


def pushed(model, graph, moves, strains):
    """`H v`."""

    def of(positions, cell):
        return energy(model, replace(graph, positions=positions, cell=cell)).sum()

    return jax.jvp(jax.grad(of, (0, 1)), (graph.positions, graph.cell), (moves, strains))[1]


def one_by_one(function, *trees):
    """A loop instead of `vmap`."""
    rows = [function(*jax.tree.map(lambda x, k=k: x[k], trees)) for k in range(3)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def check(model, program, expected, args, calls=1):
    compiled = jax.jit(program, compiler_options=QUICK).lower(*args).compile()
    before = model.wrapper.stats()["calls"]
    found = jax.block_until_ready(compiled(*args))
    assert model.wrapper.stats()["calls"] - before == calls
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())


@pytest.fixture(scope="module")
def products(model, cases):
    _, several, moves, strains = cases
    product = jax.jit(lambda *args: pushed(model, *args), compiler_options=QUICK)
    with jax.enable_x64(True):
        return one_by_one(product, several, moves, strains)


def test_products_of_mapped_graphs_are_one_call(model, cases, products):
    _, several, moves, strains = cases

    def mapped(several, moves, strains):
        return jax.vmap(lambda *args: pushed(model, *args))(several, moves, strains)

    check(model, mapped, products, (several, moves, strains))
    outside = mapped(several, moves, strains)  # of a program
    for a, b in zip(outside, products, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-11 * np.abs(b).max())


def test_products_of_mapped_geometries_along_one_vector_are_one_call(model, cases):
    graph, several, moves, _ = cases

    def pushed_by_move(positions):
        def total(x):
            return energy(model, replace(graph, positions=x)).sum()

        return jax.jvp(jax.grad(total), (positions,), (moves[0],))[1]

    expected = one_by_one(jax.jit(pushed_by_move, compiler_options=QUICK), several.positions)
    check(model, jax.vmap(pushed_by_move), expected, (several.positions,))


def test_nested_maps_are_one_call(model, cases, products):
    _, several, moves, strains = cases
    twice = [
        jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), tree) for tree in (several, moves, strains)
    ]
    expected = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), products)
    check(
        model,
        lambda *args: jax.vmap(jax.vmap(lambda *args: pushed(model, *args)))(*args),
        expected,
        tuple(twice),
    )


@pytest.mark.parametrize("outside", [True, False], ids=["grad of vmap", "vmap of grad"])
def test_losses_of_forces_call_once_more(model, cases, outside):
    """Once for the forces, and once for the derivative of the loss."""
    graph, several, _, _ = cases

    def loss(positions):
        def total(x):
            return energy(model, replace(graph, positions=x)).sum()

        return (jax.grad(total)(positions) ** 2).sum()

    expected = one_by_one(jax.jit(jax.grad(loss), compiler_options=QUICK), several.positions)
    program = jax.vmap(jax.grad(loss))
    if outside:
        program = jax.grad(lambda xs: jax.vmap(loss)(xs).sum())
    check(model, program, expected, (several.positions,), calls=2)


def test_hessians_of_mapped_geometries(model, cases):
    """A loop over the vectors, each with one merged graph."""
    graph, several, _, _ = cases
    first = jnp.eye(graph.positions.size)[:5].reshape(5, *graph.positions.shape)

    def rows(positions):
        def total(x):
            return energy(model, replace(graph, positions=x)).sum()

        push = jax.linearize(jax.grad(total), positions)[1]
        return jax.vmap(push)(first)

    expected = one_by_one(jax.jit(rows, compiler_options=QUICK), several.positions)
    check(model, jax.vmap(rows), expected, (several.positions,), calls=5)


@pytest.mark.slow
def test_third_derivatives_of_mapped_geometries(model, cases):
    graph, several, moves, _ = cases

    def third(positions, v):
        def slope(t):
            return energy(model, replace(graph, positions=positions + t * v)).sum()

        return jax.grad(jax.grad(jax.grad(slope)))(0.0)

    expected = one_by_one(jax.jit(third), several.positions, moves)
    for program in (
        jax.vmap(third),
        lambda xs, vs: jax.jvp(
            lambda t: jax.vmap(
                lambda x, v: jax.grad(
                    jax.grad(
                        lambda s: energy(model, replace(graph, positions=x + (s + t) * v)).sum()
                    )
                )(0.0)
            )(xs, vs),
            (0.0,),
            (1.0,),
        )[1],
    ):
        found = jax.jit(program)(several.positions, moves)
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_products_without_jit(model, cases, products):
    _, several, moves, strains = cases
    first = jax.tree.map(lambda x: x[0], (several, moves, strains))
    with jax.disable_jit():
        found = pushed(model, *first)
    for a, b in zip(found, products, strict=True):
        np.testing.assert_allclose(a, b[0], rtol=0, atol=1e-11 * np.abs(b).max())


def test_no_geometries(model, cases):
    _, several, moves, strains = cases
    none = jax.tree.map(lambda x: x[:0], (several, moves, strains))
    found = jax.vmap(lambda *args: pushed(model, *args))(*none)
    assert [x.shape for x in found] == [moves[:0].shape, strains[:0].shape]


class Kinked(torch.nn.Module):
    """An energy whose second derivatives are not finite where a coordinate is zero."""

    def forward(self, graph: dict[str, torch.Tensor]) -> torch.Tensor:
        per_atom = graph["pos"].abs().pow(1.5).sum(1)
        return torch.zeros_like(graph["charge"]).index_add(0, graph["batch"], per_atom)


@pytest.mark.parametrize("value, found", [(0.0, "Hessian-vector product"), (np.nan, "energy")])
def test_float_checks_find_nans_of_mapped_graphs(cases, value, found):
    _, several, moves, _ = cases
    model = TorchMliap.from_energy(Kinked(), 2.0, engine="eager")

    def products(several):
        def product(graph, move):
            def total(x):
                return energy(model, replace(graph, positions=x)).sum()

            return jax.jvp(jax.grad(total), (graph.positions,), (move,))[1]

        return jax.vmap(product)(several, moves)

    run = jax.jit(checkify.checkify(products, errors=checkify.float_checks), compiler_options=QUICK)
    assert run(several)[0].get() is None
    wrong = replace(several, positions=several.positions.at[1, 0, 0].set(value))
    assert f"torchcall: {found}" in run(wrong)[0].get()


@pytest.mark.parametrize("mapped", [False, True], ids=["one", "mapped"])
def test_programs_of_products_release_the_model(cases, mapped):
    graph, several, moves, _ = cases

    def run():
        model = example_energies.potential(NAME, "eager")[0]

        def product(x):
            def total(x):
                return energy(model, replace(graph, positions=x)).sum()

            return jax.jvp(jax.grad(total), (x,), (moves[0],))[1]

        program = jax.jit(jax.vmap(product) if mapped else product, compiler_options=QUICK)
        x = several.positions if mapped else graph.positions
        jax.block_until_ready(program(x))
        return weakref.ref(model.wrapper)

    wrapper = run()
    gc.collect()
    assert wrapper() is None
