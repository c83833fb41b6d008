"""`jit` over sharded arrays: without a rule the whole call, with one a part on each device."""

from typing import Any

import eight
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule
from twins import wrapped

WITHOUT = """
    from contextlib import nullcontext

    f = wrapped(Both(), ENGINE)
    same("sharded arguments", f(xs, ys), in_jax(x, y))
    same("sharded, jit", jax.jit(f)(xs, ys), in_jax(x, y))
    same("sharded results", jax.jit(f, out_shardings=split)(xs, ys), in_jax(x, y))
    limit = jax.lax.with_sharding_constraint
    same("a constraint", jax.jit(lambda x, y: f(limit(x, split), y))(x, ys), in_jax(x, y))
    same("grad", jax.jit(jax.grad(square(f), BOTH))(xs, ys), jax.grad(square(in_jax), BOTH)(x, y))
    same("vmap", jax.jit(jax.vmap(f, (0, None)))(xs, ys), in_jax(x, y))
    explicit = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Explicit,))
    xe = jax.device_put(x, NamedSharding(explicit, P("i")))
    rows = lambda f: jax.vmap(jax.grad(square(f), BOTH), (0, None))
    # With the mesh in the context, and with that of the arrays alone.
    for context in (jax.set_mesh(explicit), nullcontext()):
        with context:
            same("explicit", jax.jit(f)(xe, y), in_jax(x, y))
            found = jax.jit(jax.grad(square(f), BOTH))(xe, y)
            same("explicit grad", found, jax.grad(square(in_jax), BOTH)(x, y))
            same("explicit vmap of grad", jax.jit(rows(f))(xe, y), rows(in_jax)(x, y))
    for device in jax.devices()[:3]:
        out = jax.jit(f)(jax.device_put(x, device), jax.device_put(y, device))
        assert out[0].devices() == {device}
"""

WITH = """
    def collectives(compiled):
        return set(re.findall("all-[a-z]+|collective-[a-z]+|reduce-scatter", compiled.as_text()))

    def divided(name, f, twin, args, expected=()):
        compiled = jax.jit(f).lower(*args).compile()
        assert collectives(compiled) == set(expected), (name, collectives(compiled))
        before = wrapper.stats()["calls"]
        out = jax.block_until_ready(compiled(*args))
        same(name, out, twin(x, y))
        return out, wrapper.stats()["calls"] - before

    def gradients(f):
        return jax.grad(square(f), BOTH)

    wrapper = wrapped(Both(), ENGINE, sharding_rule="b i, i -> b, b i")
"""

CALLS = """
    out, calls = divided("a call", wrapper, in_jax, (xs, ys))
    assert calls == 8 and out[1].sharding.spec == P("i"), out[1].sharding
    divided("grad", gradients(wrapper), gradients(in_jax), (xs, ys), ["all-reduce"])

    # The mapped axis of vmap is divided, too: "i" cannot be.
    wrapper = wrapped(Both(), ENGINE, sharding_rule="i, i -> , i")
    mapped = jax.vmap(wrapper, (0, None))
    divided("grad of vmap", gradients(mapped), gradients(in_jax), (xs, ys), ["all-reduce"])

    explicit = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Explicit,))
    wrapper = wrapped(Both(), ENGINE, sharding_rule="... i, i -> ..., ... i")
    with jax.set_mesh(explicit):
        xe = jax.device_put(x, P("i"))
        assert jax.jit(wrapper).trace(xe, y).jaxpr.out_avals[1].sharding.spec == P("i", None)
        divided("explicit", wrapper, in_jax, (xe, y))

    # XLA divides each axis of the reshaped array by a part of the mesh's, which has no name.
    pairs = lambda f: lambda x, y: jax.lax.map(lambda rows: f(rows, y)[1], x.reshape(4, 4, 3))
    same("lax.map", jax.jit(pairs(wrapper))(xs, ys), pairs(in_jax)(x, y))

    # A rule that is not true: the model does not return as many rows as it gets.
    def first(x: torch.Tensor) -> torch.Tensor:
        return x[: min(x.shape[0], 1)] if x.shape[0] < 16 else x

    untrue = wrapped(first, ENGINE, sharding_rule="b i -> b i")
    try:
        jax.block_until_ready(jax.jit(untrue)(xs))
    except jax.errors.JaxRuntimeError as error:
        assert "output: expected float32 (2, 3), got float32 (1, 3)" in str(error), error
    else:
        raise AssertionError("no error")

    from jax.experimental.serialize_executable import serialize

    try:
        serialize(jax.jit(untrue).lower(xs).compile())
    except TypeError as error:
        assert "cannot serialise a program whose devices divide calls" in str(error)
    else:
        raise AssertionError("no error")
"""

IN_PROGRAMS = """
    def tangents(f):
        return lambda x, y: jax.jvp(f, (x, y), (jnp.cos(x), y))

    def second(f):  # of a gradient by an argument that all devices use
        return jax.grad(lambda x, y: (jax.grad(square(f), 1)(x, y) ** 2).sum(), BOTH)

    def loop(f):
        return lambda x, y: jax.lax.scan(lambda x, _: (f(x, y)[1] + x / 2, None), x, None, 9)[0]

    same("outside jit", wrapper(xs, ys), in_jax(x, y))
    divided("jvp", tangents(wrapper), tangents(in_jax), (xs, ys))
    divided("second order", second(wrapper), second(in_jax), (xs, ys), ["all-reduce"])
    divided("scan", loop(wrapper), loop(in_jax), (xs, ys))
    # Of an axis that no device may divide.
    across = jax.device_put(jnp.ones((3, 8)), NamedSharding(mesh, P(None, "i")))
    same("gathered", jax.jit(wrapper)(across, jnp.ones(8)), in_jax(across, jnp.ones(8)))
    # Of a size that eight devices cannot divide.
    odd = lambda f: lambda x, y: f(jnp.concatenate([x, x[:3]]), y)
    same("uneven", jax.jit(odd(wrapper))(xs, ys), odd(in_jax)(x, y))
    one = jax.device_put(x, jax.devices()[3])
    assert jax.jit(wrapper)(one, jax.device_put(y, jax.devices()[3]))[0].devices() == one.devices()
    inside = jax.shard_map(wrapper, mesh=mesh, in_specs=(P("i"), P()), out_specs=(P("i"), P("i")))
    same("shard_map", jax.jit(inside)(xs, ys), in_jax(x, y))

    names = ("a", "b")
    table = jax.make_mesh((4, 2), names, axis_types=(AxisType.Auto,) * 2)
    for axes in ("a", names):
        both = jax.device_put((x, y), tuple(NamedSharding(table, p) for p in (P(axes), P())))
        divided("two axes", wrapper, in_jax, both)
        divided("grad, two axes", gradients(wrapper), gradients(in_jax), both, ["all-reduce"])
    manual = jax.shard_map(
        wrapper, mesh=table, in_specs=(P("a"), P()), out_specs=(P("a"), P("a")), axis_names={"a"}
    )
    same("an axis of shard_map, an axis of jit", jax.jit(manual)(*both), in_jax(x, y))

    explicit = jax.make_mesh((8,), ("i",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(explicit):
        xe = jax.device_put(x, P("i"))
        divided("explicit grad", gradients(wrapper), gradients(in_jax), (xe, y), ["all-reduce"])

    for method in ("sequential", "expand_dims", "broadcast_all"):
        wrapper = wrapped(Both(), ENGINE, sharding_rule="i, i -> , i", vmap_method=method)
        mapped = jax.vmap(wrapper, (0, None))
        divided(method, mapped, in_jax, (xs, ys))
        divided("grad of " + method, gradients(mapped), gradients(in_jax), (xs, ys), ["all-reduce"])
"""


@pytest.mark.parametrize("engine", eight.ENGINES)
def test_without_a_rule_calls_are_right(tmp_path, engine):
    eight.run(tmp_path, engine, WITHOUT)


@pytest.mark.parametrize("engine", eight.ENGINES)
def test_with_a_rule_each_device_calls_the_model_on_its_part(tmp_path, engine):
    eight.run(tmp_path, engine, WITH + CALLS)


@pytest.mark.slow  # many programs
@pytest.mark.parametrize("engine", ["TorchScript", "eager"])
def test_a_rule_holds_in_larger_programs_and_on_other_meshes(tmp_path, engine):
    eight.run(tmp_path, engine, WITH + IN_PROGRAMS)


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y


X, Y = jnp.ones((4, 3)), jnp.ones((3, 5))


def test_a_rule_changes_nothing_on_one_device():
    rules: list[Any] = ["b i, i k -> b k", "... i, i k -> ... k", "b w, v k -> b u"]
    matrix = ArrayMapping("b", "i"), ArrayMapping("i", "k")
    rules.append(SdyShardingRule(matrix, (ArrayMapping("b", "k"),), reduction_factors=("i",)))
    pair = ArrayMapping(CompoundFactor("b", "c"), "i")
    rules.append(SdyShardingRule((pair, matrix[1]), (ArrayMapping("d", "k"),), b=2, c=2))
    for rule in rules:
        f = wrapped(product, "eager", sharding_rule=rule)
        np.testing.assert_array_equal(f(X, Y), X @ Y)
        assert "sharding_rule=" in repr(f)


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("b i -> b", "expected 2 operands, one for each array, got 1 in 'b i -> b'"),
        ("b i, i k, c -> b k", "expected 2 operands, one for each array, got 3"),
        ("b i, i k -> b k, b", "expected 1 outputs, one for each array, got 2"),
        ("b i, i -> b k", r"operand args\[1\]: expected 2 axes, got 1 in 'b i, i -> b k'"),
        ("... b i l, i k -> b k", r"operand args\[0\]: expected 2 axes, got 3"),
        ("b i, b k -> b k", r"one size of 'b' in .*, got 4 in operand args\[0\] and 3 in "),
        ("b i, i k -> b i", "one size of 'i' in .*, got 3 in operand .* and 5 in output"),
    ],
)  # fmt: skip
def test_a_rule_that_does_not_fit_is_one_clear_error(rule, expected):
    f = wrapped(product, "eager", sharding_rule=rule)
    with pytest.raises(ValueError, match=f"^torchcall: product: sharding_rule: .*{expected}"):
        f(X, Y)


def test_what_is_no_rule_is_refused():
    for rule, expected in {
        "b i": "expected a rule such as 'b i, j -> b', got 'b i': There is no -> in rule",
        "b. -> b": "got 'b. -> b': Character '.' must be used inside ellipsis",
    }.items():
        with pytest.raises(ValueError, match=r"^torchcall: sharding_rule: ") as caught:
            wrapped(product, "eager", sharding_rule=rule)
        assert expected in str(caught.value)
    with pytest.raises(TypeError, match=r"expected a string such as .* got tuple"):
        wrapped(product, "eager", sharding_rule=("b",))
