"""States and neighbour lists whose arrays are sharded over explicit axes of a mesh."""

from pathlib import Path

from models import run_python

PROGRAM = """
    import sys
    sys.path.insert(0, {here!r})
    import jax, jax.numpy as jnp, numpy as np
    import states
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from torchcall.mliap import (
        HyperGraph, TorchMliapInput, lens, make_torch_mliap_from_state, neighbor_list,
        torch_mliap_model_fn,
    )

    jax.config.update("jax_enable_x64", True)
    model = states.model()
    state = states.state(model)
    particles, systems = state.particles.data, state.systems.data
    order = np.argsort(particles.system.indices, stable=True)
    x, batch = particles.positions[order], particles.system.indices[order]
    neighbors = neighbor_list(float(model.cutoff.data[0])).allocate(
        x, systems.cell, systems.pbc, batch
    )
    potential = make_torch_mliap_from_state(
        lens(lambda s: s), compute_position_and_cell_gradients=True
    )

    def of_graph(given):
        state = given[0]
        edges = state.neighborlist.edges
        graph = HyperGraph(state.particles, state.systems, edges)
        return torch_mliap_model_fn(
            TorchMliapInput(model, graph), compute_cell_gradients=True
        ).data

    programs = dict(
        potential=lambda given: potential(given[0]).data,
        model_fn=of_graph,
        update=lambda given: given[1].update(
            given[2] + 0.01, given[0].systems.data.cell
        ).edge_index,
    )
    given = state, neighbors, x
    mesh = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Explicit,))

    def put(x):
        spec = P("i") if jnp.ndim(x) and len(x) % 8 == 0 else P()
        return jax.device_put(x, NamedSharding(mesh, spec)) if isinstance(x, jax.Array) else x

    sharded = jax.tree.map(put, given)
    assert sharded[0].particles.data.positions.sharding.spec == P("i")
    for name, program in programs.items():
        expected = jax.jit(program)(given)
        # A list on several devices is refused outside programs.
        for run in (jax.jit(program), *([] if name == "update" else [program])):
            found = run(sharded)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, err_msg=name)
    print("done")
"""


def test_states_and_lists(tmp_path):
    program = PROGRAM.format(here=str(Path(__file__).parent))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert run_python(tmp_path, program, **flags).stdout == "done\n"
