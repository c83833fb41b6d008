"""Second derivatives of `energy` against those of its JAX twins, and finite differences."""

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
from reference import CUTOFF, one_thread  # noqa: F401

from torchcall.mliap import TorchMliap, committee, energy, energy_and_gradients

pytestmark = pytest.mark.usefixtures("x64")
ENGINES = ["script", "eager"]
KINDS = ("triclinic", "slab")


def quick(function):
    return jax.jit(function, compiler_options=QUICK)


def total(model, graph):
    """The sum of all energies, a function of positions and cells."""

    def of(positions, cell):
        return energy(model, replace(graph, positions=positions, cell=cell)).sum()

    return of


def assert_close(found, expected, scale):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11 * scale)


@pytest.fixture(scope="module")
def members():
    return [reference.systems()[kind] for kind in KINDS]


def directions(members):
    """Per system, tangents of positions and cell."""
    generator = np.random.default_rng(0)
    return [
        (generator.normal(size=m.positions.shape), generator.normal(size=(3, 3))) for m in members
    ]


@pytest.fixture(scope="module")
def products(members):
    """By potential and system: `H v` in positions and cell, by the twin in JAX."""

    def product(name, module, member, v):
        of = reference.twin(name, module, member)
        x = member.positions, member.cell
        return quick(lambda x, v: jax.jvp(jax.grad(of, (0, 1)), x, v)[1])(x, v)

    modules, vs = reference.potentials(), directions(members)
    with jax.enable_x64(True):
        return {
            name: [product(name, modules[name], members[k], vs[k]) for k in range(n)]
            for name, n in (("Stillinger-Weber", 2), ("message passing", 1))
        }


@pytest.mark.parametrize("name", ["Stillinger-Weber", "message passing"])
@pytest.mark.parametrize("engine", ENGINES)
def test_hessian_vector_products_equal_those_of_the_twin(members, products, name, engine):
    model, _ = example_energies.potential(name, engine)
    members = members[: len(products[name])]
    graph, places = graphs.shuffled(graphs.atom_graph(members, slots=3), 4, padding=2)
    vs = directions(members)
    moves = np.zeros(graph.positions.shape)
    moves[places] = np.concatenate([v for v, _ in vs])
    strains = np.stack([w for _, w in vs])

    def push(x, h):
        gradient = jax.grad(total(model, graph), (0, 1))
        return jax.jvp(gradient, (x, h), (jnp.asarray(moves), jnp.asarray(strains)))[1]

    by_position, by_cell = quick(push)(graph.positions, graph.cell)
    expected = np.concatenate([p for p, _ in products[name]])
    assert_close(by_position[places], expected, np.abs(expected).max())
    assert not np.delete(np.asarray(by_position), places, axis=0).any()
    expected = np.stack([c for _, c in products[name]])
    assert_close(by_cell, expected, np.abs(expected).max())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hessian_vector_product_is_one_call(members, engine):
    model, module = example_energies.potential("Stillinger-Weber", engine)
    graph = graphs.atom_graph(members[:1])
    of = total(model, graph)
    v = jnp.asarray(directions(members)[0][0])
    twin = reference.twin("Stillinger-Weber", module, members[0])
    expected = quick(lambda x: jax.jvp(jax.grad(lambda x: twin(x, graph.cell[0])), (x,), (v,))[1])(
        graph.positions
    )

    def gradient(x):
        return jax.grad(of)(x, graph.cell)

    def gradients_of_one_evaluation(x):
        return energy_and_gradients(model, replace(graph, positions=x)).position_gradients

    ways = {
        "jvp of grad": lambda x: jax.jvp(gradient, (x,), (v,))[1],
        "grad of grad": jax.grad(lambda x: jnp.vdot(gradient(x), v)),
        "vjp of grad": lambda x: jax.vjp(gradient, x)[1](v)[0],
        "jvp of gradients": lambda x: jax.jvp(gradients_of_one_evaluation, (x,), (v,))[1],
        "linearize": lambda x: jax.linearize(gradient, x)[1](v),
    }
    for name, product in ways.items():
        compiled = quick(product).lower(graph.positions).compile()
        before = model.wrapper.stats()["calls"]
        found = jax.block_until_ready(compiled(graph.positions))
        assert model.wrapper.stats()["calls"] - before == 1, name
        assert_close(found, expected, np.abs(expected).max())


def test_a_gradient_penalty_maps_over_geometries(members):
    model, module = example_energies.potential("Stillinger-Weber", "script")
    graph, of_twin = (
        graphs.atom_graph(members[:1]),
        reference.twin("Stillinger-Weber", module, members[0]),
    )
    moves = np.random.default_rng(1).normal(scale=0.01, size=(2, *graph.positions.shape))
    several = graph.positions + moves

    def penalty(of):
        return lambda x: (jax.grad(of)(x, graph.cell if of is own else graph.cell[0]) ** 2).sum()

    own = total(model, graph)
    found = quick(jax.vmap(jax.grad(penalty(own))))(several)
    expected = quick(jax.vmap(jax.grad(penalty(of_twin))))(several)
    assert_close(found, expected, np.abs(expected).max())


def test_the_gradient_of_a_trajectory_equals_the_twins(members):
    model, module = example_energies.potential("Stillinger-Weber", "eager")
    graph, member = graphs.atom_graph(members[:1]), members[0]
    own = total(model, graph)
    of_twin = reference.twin("Stillinger-Weber", module, member)

    def final(force_of):
        def after(velocity):
            def step(state, _):
                x, v = state
                v = v - 1e-3 * force_of(x)
                return (x + 1e-3 * v, v), None

            (x, _), _ = jax.lax.scan(step, (graph.positions, velocity), length=3)
            return (x**2).sum()

        return quick(jax.grad(after))(jnp.ones_like(graph.positions))

    found = final(jax.grad(lambda x: own(x, graph.cell)))
    expected = final(jax.grad(lambda x: of_twin(x, graph.cell[0])))
    assert_close(found, expected, np.abs(expected).max())


@pytest.mark.slow
def test_third_derivatives(members):
    model, module = example_energies.potential("Stillinger-Weber", "script")
    graph = graphs.atom_graph(members[:1])
    v = jnp.asarray(np.random.default_rng(0).normal(size=graph.positions.shape))

    def third(of):
        def slope(t):
            return of(graph.positions + t * v)

        return quick(jax.grad(jax.grad(jax.grad(slope))))(0.0)

    own = total(model, graph)
    of_twin = reference.twin("Stillinger-Weber", module, members[0])
    expected = third(lambda x: of_twin(x, graph.cell[0]))
    assert_close(third(lambda x: own(x, graph.cell)), expected, abs(expected))


def test_force_constants_of_silicon_equal_finite_differences_of_forces(members):
    """Of the gradients that eager torch computes."""
    model, module = example_energies.potential("Stillinger-Weber", "script")
    graph = graphs.atom_graph(members[:1])
    member = members[0]
    found = quick(jax.hessian(lambda x: total(model, graph)(x, graph.cell)))(graph.positions)
    found = np.asarray(found).reshape(24, 24)
    step = 1e-3

    def gradients(moved):
        input = reference.graph([member.moved(moved, member.cell)], phantom=False)
        return module(input)["position_gradients"].numpy().reshape(-1)

    for k in (0, 7, 23):
        columns = []
        for h in (step, step / 2):  # Richardson: the error is of fourth order
            move = np.zeros(24)
            move[k] = h
            move = move.reshape(-1, 3)
            difference = gradients(member.positions + move) - gradients(member.positions - move)
            columns.append(difference / (2 * h))
        expected = (4 * columns[1] - columns[0]) / 3
        np.testing.assert_allclose(found[k], expected, rtol=0, atol=1e-8 * np.abs(found).max())


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_positions_and_float64_weights(members, products, engine):
    model, _ = example_energies.potential("message passing", engine)
    graph = graphs.atom_graph(members[:1], dtype=np.float32)
    tangents = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), directions(members)[0])

    def push(x, h):
        gradient = jax.grad(total(model, graph), (0, 1))
        return jax.jvp(gradient, (x, h), (tangents[0], tangents[1][None]))[1]

    for found, expected in zip(
        quick(push)(graph.positions, graph.cell), products["message passing"][0], strict=True
    ):
        assert found.dtype == jnp.float32
        expected = np.asarray(expected).reshape(found.shape)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_products_are_nan_where_edges_may_be_missing(members):
    model, _ = example_energies.potential("Stillinger-Weber", "script")
    graph = graphs.atom_graph(members[:1])
    v = jnp.ones_like(graph.positions)

    def products(flag):
        of = total(model, replace(graph, did_overflow=flag))

        def gradient(x):
            return jax.grad(of)(x, graph.cell)

        pushed = jax.jvp(gradient, (graph.positions,), (v,))[1]
        return pushed, jax.vjp(gradient, graph.positions)[1](v)[0]

    for found in quick(products)(True):
        assert np.isnan(found).all()
    for found in quick(products)(False):
        assert np.isfinite(found).all()


class Linear(torch.nn.Module):
    """E = Σ x, which does not depend on the cell."""

    def forward(self, graph: dict[str, torch.Tensor]) -> torch.Tensor:
        per_atom = graph["pos"][:, 0]
        return torch.zeros_like(graph["charge"]).index_add(0, graph["batch"], per_atom)


@pytest.mark.parametrize("engine", ENGINES)
def test_constant_gradients_have_zero_second_derivatives(members, engine):
    model = TorchMliap.from_energy(Linear(), CUTOFF, engine=engine)
    graph = graphs.atom_graph(members[:1])
    for arguments in (0, 1, (0, 1)):
        hessian = jax.hessian(total(model, graph), arguments)
        blocks = jax.tree.leaves(quick(hessian)(graph.positions, graph.cell))
        assert not any(np.asarray(block).any() for block in blocks)


class PartlyDetached(torch.nn.Module):
    """½ Σ x², whose position gradients have derivatives, and cell gradients none."""

    def forward(self, graph: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = graph["pos"]
        per_atom = 0.5 * (x * x).sum(1)
        energy = torch.zeros_like(graph["charge"]).index_add(0, graph["batch"], per_atom)
        return {
            "energy": energy,
            "position_gradients": x * 1,
            "cell_gradients": torch.zeros_like(graph["cell"]).detach(),
        }


def test_cell_gradients_that_are_not_used_need_no_derivatives(members):
    wrapper = TorchMliap.from_module(graphs.script(PartlyDetached()), CUTOFF, True).wrapper
    graph = graphs.atom_graph(members[:1])
    without = TorchMliap(TorchMliap.from_energy(Linear(), CUTOFF).cutoff, wrapper, False)
    found = quick(jax.hessian(lambda x: total(without, graph)(x, graph.cell)))(graph.positions)
    n = graph.positions.size
    assert_close(found.reshape(n, n), np.eye(n), 1)
    with pytest.raises(NotImplementedError, match=r"output \['cell_gradients'\]"):
        jax.eval_shape(
            jax.hessian(total(replace(without, compute_cell_gradients=True), graph)),
            graph.positions,
            graph.cell,
        )


class Cube(torch.autograd.Function):
    """x³. Its backward is computed outside of torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, *cotangents):
        x = ctx.saved_tensors[0].detach().numpy()
        return torch.from_numpy(3 * x**2 * cotangents[0].detach().numpy())


class Cubes(torch.nn.Module):
    def forward(self, graph):
        per_atom = Cube.apply(graph["pos"]).sum(1)
        return torch.zeros_like(graph["charge"]).index_add(0, graph["batch"], per_atom)


def test_a_backward_outside_of_torch_is_an_error_at_trace_time(members):
    model = TorchMliap.from_energy(Cubes(), CUTOFF, engine="eager")
    graph = graphs.atom_graph(members[:1])
    of = total(model, graph)
    first = quick(jax.grad(of))(graph.positions, graph.cell)
    np.testing.assert_allclose(first, 3 * graph.positions**2, rtol=1e-12)
    with pytest.raises(NotImplementedError, match="differ by 100% from finite differences"):
        jax.eval_shape(jax.hessian(of), graph.positions, graph.cell)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_that_a_module_detaches_are_an_error_at_trace_time(members, engine):
    module = reference.potentials()["Stillinger-Weber"]
    module = graphs.script(module) if engine == "script" else module
    model = TorchMliap.from_module(module, CUTOFF, True)
    graph = graphs.atom_graph(members[:1])
    of = total(model, graph)
    text = (
        r"torchcall: .*second derivatives: expected a module whose output \['position_gradients'\]"
    )
    before = model.wrapper.stats()["calls"]
    for second in (
        jax.hessian(of),
        jax.grad(lambda x, h: jax.grad(of)(x, h).sum()),
    ):
        with pytest.raises(NotImplementedError, match=text):
            jax.eval_shape(second, graph.positions, graph.cell)
    assert model.wrapper.stats()["calls"] == before


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_which_a_part_is_detached_are_an_error(members, engine):
    module = reference.potentials()["Stillinger-Weber"]
    module = graphs.script(module) if engine == "script" else module
    detached = TorchMliap.from_module(module, CUTOFF, True)
    attached, _ = example_energies.potential("Stillinger-Weber", engine)
    graph = graphs.atom_graph(members[:1])
    text = r"expected a module whose output \['position_gradients'\] autograd can differentiate"
    of = total(committee([attached, detached]), graph)
    with pytest.raises(NotImplementedError, match=text):
        jax.eval_shape(jax.hessian(of), graph.positions, graph.cell)
    of = total(committee([attached, attached]), graph)
    assert jax.eval_shape(jax.hessian(of), graph.positions, graph.cell).shape == (8, 3, 8, 3)


def test_a_function_of_jax_as_wrapper_is_differentiated_by_jax(members):
    def quadratic(input):
        x = input["pos"]
        per_system = jnp.zeros(len(input["cell"])).at[input["batch"]].add((x**2).sum(1))
        return {"energy": per_system, "position_gradients": 2 * x}

    graph = graphs.atom_graph(members[:1])
    model = replace(TorchMliap.from_energy(Linear(), CUTOFF), wrapper=quadratic)
    model = replace(model, compute_cell_gradients=False)
    found = quick(jax.hessian(lambda x: total(model, graph)(x, graph.cell)))(graph.positions)
    n = graph.positions.size
    assert_close(found.reshape(n, n), 2 * np.eye(n), 1)
