"""`jax.export` of programs with potentials: they run in another process, for any sizes."""

import pickle
from dataclasses import replace
from pathlib import Path

import graphs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from engines import changed, package  # noqa: F401
from jax import export
from models import error_of, run_python
from reference import CUTOFF

import torchcall
from torchcall.mliap import AtomGraph, TorchMliap, energy, energy_and_gradients, neighbor_list

pytestmark = pytest.mark.usefixtures("x64")

KINDS = ("TorchScript", "AOTInductor")

CHILD = """
    import pickle, sys
    from pathlib import Path
    import jax, numpy as np
    jax.config.update("jax_enable_x64", True)
    sys.path.append({folder!r})
    from jax import export
    from test_exported_potentials import close, potential

    cases = pickle.loads(Path("cases").read_bytes())
    models = [potential(*pair) for pair in {pairs}]
    for name, blob, arguments in cases:
        run = export.deserialize(bytearray(blob)).call
        for given, expected in arguments:
            close(run(given), expected, name)
    print("right")
"""


def potential(engine, path):
    if engine == "AOTInductor":
        return TorchMliap.from_package(path)
    return TorchMliap.from_module(path, CUTOFF, True)


def close(got, expected, what=""):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9, err_msg=what),
        got,
        expected,
    )


def exported(f, *args):
    return export.export(jax.jit(f), disabled_checks=torchcall.export_checks())(*args)


def of_any_size():
    """A graph with symbolic sizes."""
    n, b, e = export.symbolic_shape("n, b, e", constraints=["e >= 2"])
    shapes = {
        "positions": ((n, 3), float),
        "atomic_numbers": ((n,), np.int32),
        "cell": ((b, 3, 3), float),
        "pbc": ((b, 3), bool),
        "batch": ((n,), np.int32),
        "edge_index": ((2, e), np.int32),
        "cell_offsets": ((e, 3), float),
        "n_edges": ((), np.int32),
    }
    return AtomGraph(**{key: jax.ShapeDtypeStruct(*spec) for key, spec in shapes.items()})


def in_torch(members):
    """Energies and gradients of the module itself."""
    out = reference.potentials()["Lennard-Jones"](reference.graph(members, phantom=False))
    keys = ("energy", "position_gradients", "cell_gradients")
    return tuple(out[key].detach().numpy() for key in keys)


def gradients(model):
    def of(graph):
        def total(x, h):
            return energy(model, replace(graph, positions=x, cell=h)).sum()

        return jax.value_and_grad(total, (0, 1))(graph.positions, graph.cell)

    return of


@pytest.fixture
def pairs(tmp_path, package):  # noqa: F811
    script = tmp_path / "lennard_jones.pt"
    graphs.script(reference.potentials()["Lennard-Jones"]).save(script)
    return list(zip(KINDS, map(str, (script, package)), strict=True))


def test_potentials_run_in_another_process(tmp_path, pairs):
    systems = list(reference.systems().values())
    # Two batches of other sizes than each other.
    batches = [systems[:2], systems[3:6]]
    given = [graphs.atom_graph(batch, slots=2 * k) for k, batch in enumerate(batches)]
    values = [in_torch(batch) for batch in batches]
    totals = [(energies.sum(), tuple(rest)) for energies, *rest in values]
    script, compiled = (potential(*pair) for pair in pairs)
    n_moved = len(reference.systems()["slab"].positions)
    x, v = graphs.atom_graph([reference.systems()["slab"]]), np.sin(np.arange(3.0 * n_moved))

    def displaced(graph):
        def of(shift):
            return energy(script, replace(graph, positions=graph.positions + shift))

        return jax.vmap(of)(jnp.arange(3.0))

    def hessian_product(graph):
        def of(positions):
            return jax.grad(lambda x: energy(script, replace(graph, positions=x)).sum())(positions)

        return jax.jvp(of, (graph.positions,), (v.reshape(-1, 3),))[1]

    programs = {
        "for any sizes": (gradients(script), of_any_size(), zip(given, totals, strict=True)),
        "mapped": (displaced, given[0], [(given[0], np.tile(values[0][0], (3, 1)))]),
        "neighbours": with_a_list(script),
        "second derivatives": (hessian_product, x, [(x, hessian_product(x))]),
        "a package for any sizes": (
            lambda graph: tuple(energy_and_gradients(compiled, graph)),
            of_any_size(),
            [(given[0], values[0])],
        ),
    }
    cases = [
        (name, bytes(exported(f, spec).serialize()), jax.tree.map(np.asarray, list(arguments)))
        for name, (f, spec, arguments) in programs.items()
    ]
    (tmp_path / "cases").write_bytes(pickle.dumps(cases))
    code = CHILD.format(pairs=pairs[::-1], folder=str(Path(__file__).parent))
    assert run_python(tmp_path, code).stdout == "right\n"


def with_a_list(model):
    """Energy and gradient of positions whose neighbour list the program updates."""
    system = reference.systems()["triclinic"]
    cell, numbers = jnp.asarray(system.cell)[None], jnp.asarray(system.numbers, jnp.int32)
    positions, batch = jnp.asarray(system.positions), jnp.zeros_like(numbers)
    periodic = jnp.asarray(system.pbc)[None]
    neighbors = neighbor_list(CUTOFF).allocate(positions, cell, periodic, batch)

    def of(x):
        found = neighbors.update(x, cell)
        return energy(model, AtomGraph.from_neighbors(found, x, cell, numbers)).sum()

    value, gradient, _ = in_torch([system])
    return jax.value_and_grad(of), positions, [(positions, (value.sum(), gradient))]


def test_graphs_and_results_are_arguments_of_exported_programs(pairs):
    model = potential(*pairs[0])
    graph = replace(graphs.atom_graph([reference.systems()["slab"]]), list_cutoff=CUTOFF)
    blob = exported(lambda graph: energy_and_gradients(model, graph), graph).serialize()
    again = export.deserialize(blob)
    close(again.call(graph), energy_and_gradients(model, graph))
    with pytest.raises(ValueError, match="pytree metadata"):
        again.call(replace(graph, list_cutoff=2 * CUTOFF))


@pytest.fixture
def input():
    tensors = reference.graph([reference.systems()["slab"]])
    return {key: jnp.asarray(tensor.numpy()) for key, tensor in tensors.items()}


def input_of_any_size(input):
    n, b, e = export.symbolic_shape("n, b, e")
    axes = {"cell": b, "pbc": b, "charge": b, "spin": b, "edge_index": e, "cell_offsets": e}
    shapes = {key: [axes.get(key, n), *x.shape[1:]] for key, x in input.items()}
    shapes["edge_index"] = [2, e]
    return {key: jax.ShapeDtypeStruct(shapes[key], x.dtype) for key, x in input.items()}


def test_a_package_checks_sizes_when_the_program_runs(package, input):  # noqa: F811
    f = torchcall.load(package)
    made = exported(f, input_of_any_size(input))
    close(made.call(input), f(input))
    few = {key: input[key][:1] for key in ("pos", "atomic_numbers", "batch")}
    text = error_of(lambda: made.call(input | few))
    assert "['pos']: expected float64 (N, 3) with N >= 2, got float64 (1, 3)" in text


def test_a_package_of_fixed_sizes_takes_no_symbolic_ones(tmp_path, package, input):  # noqa: F811
    sizes = {"N": len(input["pos"]), "E": len(input["cell_offsets"]), "B": len(input["cell"])}
    f = torchcall.load(changed(package, tmp_path / "static.pt2", capacity=sizes))
    text = error_of(lambda: exported(f, input_of_any_size(input)))
    assert f"with N = {sizes['N']}, the capacity that the package was compiled for, got" in text
    close(exported(f, input).call(input), f(input))
