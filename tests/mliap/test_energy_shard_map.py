"""Replicas of a system on eight virtual devices: each device's are one call, as on one device."""

from pathlib import Path

import pytest
from engines import package  # noqa: F401
from graphs import potential
from models import run_python

PROGRAM = """
    import sys
    sys.path.insert(0, {here!r})
    from dataclasses import replace
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    import engines, graphs, reference
    from torchcall.mliap import energy

    jax.config.update("jax_enable_x64", True)
    graph = graphs.atom_graph([reference.systems()["triclinic"]], slots=4)
    n = len(graph.positions)
    noise = np.random.default_rng(0).normal(scale=0.02, size=(16, n, 3))
    replicas = jax.tree.map(lambda leaf: jnp.stack([leaf] * 16), graph)
    replicas = replace(replicas, positions=replicas.positions + noise)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, P("i"))

    def results(model, graphs):
        def total(positions, cell, graph):
            return energy(model, replace(graph, positions=positions, cell=cell)).sum()
        return jax.vmap(jax.value_and_grad(total, (0, 1)))(graphs.positions, graphs.cell, graphs)

    for engine in {engines!r}:
        model = engines.potential(engine, {path!r})
        expected = jax.jit(results)(model, replicas)
        for check in (True, False):
            on_all = jax.jit(jax.shard_map(
                results, mesh=mesh, in_specs=(P(), P("i")), out_specs=P("i"), check_vma=check
            )).lower(model, jax.device_put(replicas, split)).compile()
            assert not any(word in on_all.as_text() for word in ("all-", "collective-")), engine
            before = model.wrapper.stats()["calls"]
            found = jax.block_until_ready(on_all(model, jax.device_put(replicas, split)))
            assert model.wrapper.stats()["calls"] == before + 8, engine
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, err_msg=engine)
        for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
            mesh_2 = jax.make_mesh((8,), ("i",), axis_types=(kind,))
            given = jax.device_put(replicas, jax.sharding.NamedSharding(mesh_2, P("i")))
            for name, run in {{
                "value_and_grad": results,
                "grad of vmap": jax.grad(lambda m, g: jax.vmap(
                    lambda p, graph: energy(m, replace(graph, positions=p)).sum()
                )(g.positions, g).sum(), 1, allow_int=True),
                "nested": lambda m, g: jax.vmap(lambda g: jax.vmap(
                    lambda g: energy(m, g))(jax.tree.map(lambda x: jnp.stack([x, x]), g)))(g),
                "one shared": lambda m, g: jax.vmap(
                    lambda p: energy(m, replace(graph, positions=p)))(g.positions),
                "Hessian times vector": lambda m, g: jax.vmap(lambda g: jax.jvp(jax.grad(
                    lambda p: energy(m, replace(g, positions=p)).sum()),
                    (g.positions,), (g.positions,))[1])(g),
            }}.items():
                if engine == "TorchScript" and name in ("grad of vmap", "one shared"):
                    continue  # the slow tests of the other engines have them
                if engine == "AOTInductor" and name == "Hessian times vector":
                    continue  # this package has none
                where = f"{{engine}}, {{kind}}, {{name}}"
                one = jax.jit(run)(model, replicas)
                on_all = jax.jit(run).lower(model, given).compile()
                assert not any(word in on_all.as_text() for word in ("all-", "collective-")), where
                before = model.wrapper.stats()["calls"]
                found = jax.block_until_ready(on_all(model, given))
                assert model.wrapper.stats()["calls"] == before + 8, where
                for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True):
                    if a.dtype != jax.dtypes.float0:
                        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12, err_msg=where)
    print("done")
"""


@pytest.mark.parametrize(
    "engines",
    [["TorchScript"], pytest.param(["eager", "AOTInductor"], marks=pytest.mark.slow)],
    ids=" and ".join,
)
def test_energies_and_gradients_of_replicas(engines, package, tmp_path):  # noqa: F811
    program = PROGRAM.format(here=str(Path(__file__).parent), engines=engines, path=str(package))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert run_python(tmp_path, program, **flags).stdout == "done\n"


def test_a_potential_refuses_a_sharding_rule():
    import graphs
    import reference

    from torchcall.mliap import energy

    model = potential("Lennard-Jones", sharding_rule="n i -> s")
    graph = graphs.atom_graph([reference.systems()["triclinic"]], dtype="float32")
    with pytest.raises(
        ValueError, match=r"sharding_rule: expected None for a potential.*shard_map"
    ):
        energy(model, graph)
