"""`vmap` of a call against a loop over its elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import error_of
from torch import Tensor
from twins import assert_close, random, wrapped

from torchcall import TorchModuleWrapper, load


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def rowwise(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Of vectors, or of vectors behind any leading axes."""
    return {"sum": (x * y.exp()).sum(-1), "vector": x.sin() * y}


def rowwise_in_jax(x, y):
    return {"sum": (x * jnp.exp(y)).sum(-1), "vector": jnp.sin(x) * y}


CASES = [
    (engine, method)
    for engine, methods in (
        ("TorchScript", ("sequential", "expand_dims", "broadcast_all")),
        ("eager", ("sequential", "expand_dims", "broadcast_all", "torch")),
    )
    for method in methods
]


def number(f):
    return lambda x, y: f(x, y)["sum"] + (f(x, y)["vector"] ** 2).sum()


MAPS = {
    "both": (lambda f: jax.vmap(f), (4, 3), (4, 3)),
    "under jit": (lambda f: jax.jit(jax.vmap(f)), (4, 3), (4, 3)),
    "the first": (lambda f: jax.vmap(f, (0, None)), (4, 3), (3,)),
    "the second, along its last axis": (lambda f: jax.vmap(f, (None, 1)), (3,), (3, 4)),
    "other axes": (lambda f: jax.vmap(f, (1, 0), {"sum": 0, "vector": 1}), (3, 4), (4, 3)),
    "nested": (lambda f: jax.vmap(jax.vmap(f, (0, None)), (None, 0)), (4, 3), (2, 3)),
    "nested, both mapped twice": (lambda f: jax.vmap(jax.vmap(f)), (2, 4, 3), (2, 4, 3)),
    "empty": (lambda f: jax.vmap(f), (0, 3), (0, 3)),
    "scan": (
        lambda f: (
            lambda x, y: jax.lax.scan(
                lambda x, _: (jax.vmap(f)(x, y)["vector"], jax.vmap(f)(x, y)["sum"]), x, None, 3
            )
        ),
        (4, 3),
        (4, 3),
    ),
    "of grad": (lambda f: jax.vmap(jax.grad(number(f), (0, 1)), (0, None)), (4, 3), (3,)),
    "of grad, both": (lambda f: jax.jit(jax.vmap(jax.grad(number(f), (0, 1)))), (4, 3), (4, 3)),
    "grad of": (
        lambda f: jax.grad(lambda x, y: (jax.vmap(number(f), (0, None))(x, y) ** 2).sum(), (0, 1)),
        (4, 3),
        (3,),
    ),
    "jvp of, one tangent": (
        lambda f: lambda x, y: jax.jvp(lambda x: jax.vmap(f, (0, None))(x, y), (x,), (x + 1,)),
        (4, 3),
        (3,),
    ),
    "of jvp, mapped tangent": (
        lambda f: lambda x, t: jax.vmap(lambda t: jax.jvp(lambda x: f(x, x), (x,), (t,)))(t),
        (3,),
        (4, 3),
    ),
    "of hessian": (lambda f: jax.vmap(jax.hessian(number(f))), (4, 3), (4, 3)),
    "hessian of": (
        lambda f: jax.hessian(lambda x, y: jax.vmap(number(f), (0, None))(x, y).sum(), (0, 1)),
        (2, 3),
        (3,),
    ),
    "jnp.vectorize": (
        lambda f: jnp.vectorize(lambda x, y: f(x, y)["vector"], signature="(i),(i)->(i)"),
        (2, 4, 3),
        (3,),
    ),
    "lax.map in batches": (
        lambda f: lambda x, y: jax.lax.map(lambda x: f(x, y), x, batch_size=2),
        (5, 3),
        (3,),
    ),
}


# Each engine and method, and each map: the pairs that tell most, and the others slowly.
TELLING = {("TorchScript", "sequential"), ("TorchScript", "expand_dims"), ("eager", "torch")}
PAIRS = [
    pytest.param(
        *case,
        name,
        marks=()
        if name in ("both", "of grad", "grad of") or (case in TELLING and "hessian" not in name)
        else pytest.mark.slow,
    )
    for case in CASES
    for name in MAPS
]


@pytest.mark.parametrize("engine, method, name", PAIRS)
def test_vmap_is_that_of_the_function_in_jax(engine, method, name):
    transform, *shapes = MAPS[name]
    arguments = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    f = wrapped(rowwise, engine, vmap_method=method)
    assert_close(transform(f)(*arguments), transform(rowwise_in_jax)(*arguments))


@pytest.mark.parametrize("engine, method", CASES)
def test_a_mapped_call_is_one_custom_call(engine, method):
    f = wrapped(rowwise, engine, vmap_method=method)
    x, y = random(5, 3), random(3)
    mapped = jax.jit(jax.vmap(jax.vmap(f, (0, None)), (None, 0)))
    text = mapped.lower(x, random(2, 3)).as_text()
    assert text.count("custom_call @torchcall") == 1, text
    assert "while" not in text
    f = wrapped(rowwise, engine, vmap_method=method)
    jax.vmap(f, (0, None))(x, y)
    assert f.stats()["calls"] == (5 if method == "sequential" else 1)


def test_the_model_gets_the_axis_in_the_form_that_the_method_says():
    shapes = {
        "sequential": ((3,), (3,)),
        "expand_dims": ((1, 3), (5, 3)),
        "broadcast_all": ((5, 3), (5, 3)),
        "torch": ((3,), (3,)),
    }
    seen = []

    def f(x: Tensor, y: Tensor) -> Tensor:
        seen.append((tuple(x.shape), tuple(y.shape)))
        return x * y

    for method, expected in shapes.items():
        jax.vmap(wrapped(f, "eager", vmap_method=method), (None, 0))(random(3), random(5, 3))
        assert seen[-1] == expected


@pytest.mark.parametrize("engine", ["TorchScript", "eager"])
@pytest.mark.parametrize("method", ["expand_dims", "broadcast_all"])
def test_a_model_that_does_not_return_the_axis_is_an_error(engine, method):
    f = wrapped(total, engine, vmap_method=method)
    for call in (jax.vmap(f), jax.vmap(jax.grad(f))):
        text = error_of(lambda call=call: call(random(5, 3)))
        assert f"torchcall: total (vmap_method='{method}'): " in text, text
    text = error_of(lambda: jax.vmap(f)(random(5, 3)))
    assert "output: expected float64 (5,), got float64 ()" in text, text


def total(x: Tensor) -> Tensor:
    return x.sum()


def test_a_failing_element_is_an_error_that_names_the_model():
    def f(x: Tensor) -> Tensor:
        if float(x.sum()) > 3:
            raise ValueError("too large")
        return x

    g = TorchModuleWrapper(f, output_spec=lambda x: x)
    assert "too large" in error_of(lambda: jax.vmap(g)(jnp.arange(6.0)[:, None]))
    np.testing.assert_array_equal(jax.vmap(g)(jnp.arange(3.0)[:, None])[:, 0], [0, 1, 2])


def test_files_map_like_modules(tmp_path):
    torch.jit.save(torch.jit.script(rowwise), str(tmp_path / "rowwise.pt"))
    f = load(tmp_path / "rowwise.pt", vmap_method="expand_dims")
    x, y = random(4, 3), random(3)
    assert_close(jax.vmap(f, (0, None))(x, y), rowwise_in_jax(x, y))
