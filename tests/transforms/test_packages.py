"""Derivatives of packages that were compiled with gradients, and what they refuse."""

import json
import os
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compiled_tree import arguments, load, reference
from jax import export

import torchcall
from torchcall._call.call import CallOptions


def product(f, index):
    """A function of floats that uses two of the four outputs."""

    def total(x, w):
        out = f(x, {"index": index, "w": w})
        return (out["rows"] ** 3).sum() * out["total"]

    return total


def sums(f, index):
    """A function of floats with a vector as result, which uses another output."""
    return lambda x, w: f(x, {"index": index, "w": w})["sums"][0]


def one_number(f, index):
    """The call whose only output is a single number."""
    wanted = {"total": jax.ShapeDtypeStruct((), "float32")}

    def total(x, w):
        options = CallOptions(outputs=wanted)
        return f._call((x, {"index": index, "w": w}), {}, options)["total"]

    return total


def close(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), found, expected
    )


TRANSFORMED = {
    "grad": lambda f: jax.grad(f, (0, 1)),
    "value_and_grad by one argument": jax.value_and_grad,
    "vjp": lambda f: lambda x, w: jax.vjp(f, x, w)[1](jnp.ones(())),
    "inside scan": lambda f: (
        lambda x, w: jax.lax.scan(lambda x, _: (x - 1e-6 * jax.grad(f)(x, w), f(x, w)), x, length=3)
    ),
    "vmap of grad": lambda f: (
        lambda x, w: jax.vmap(jax.grad(f, (0, 1)), (0, None))(jnp.stack([x, 2 * x]), w)
    ),
    "grad of vmap": lambda f: jax.grad(
        lambda x, w: jax.vmap(f, (None, 0))(x, jnp.stack([w, 3 * w])).sum(), (0, 1)
    ),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_derivatives_are_those_of_the_function_in_jax(tree, name):
    x, more = arguments(9, 14, 2)
    transform = TRANSFORMED[name]
    found = jax.jit(transform(product(load(tree), more["index"])))(x, more["w"])
    expected = transform(product(reference, more["index"]))(x, more["w"])
    close(found, expected)


def test_jacobians_of_one_output_get_zero_cotangents_for_the_others(tree):
    x, more = arguments(7, 2, 3)
    f = load(tree)
    found = jax.jit(jax.jacrev(sums(f, more["index"]), (0, 1)))(x, more["w"])
    close(found, jax.jacrev(sums(reference, more["index"]), (0, 1))(x, more["w"]))
    assert f.stats()["plans"] == 1


def test_one_number_has_its_value_and_gradient_in_one_call_and_forward_mode(tree):
    x, more = arguments(6, 2, 3)
    f = load(tree)
    total = one_number(f, more["index"])
    found = jax.jit(jax.value_and_grad(total))(x, more["w"])
    assert f.stats()["calls"] == 1
    close(found, (np.sin(x).sum(), np.cos(x)))
    found = jax.jit(lambda *xs: jax.jvp(total, xs, (x + 1, more["w"])))(x, more["w"])
    assert f.stats()["calls"] == 2
    close(found, (np.sin(x).sum(), (np.cos(x) * (x + 1)).sum()))


def test_gradients_have_the_operands_dtype(tree, x64):
    del x64
    x, more = arguments(6, 2, 3)
    casts = ((torch.float32, {"index": torch.int64, "w": torch.float32}), {})
    f = load(tree, input_spec=casts)
    found = jax.grad(product(f, more["index"]), (0, 1))(x.astype(np.float64), more["w"])
    assert [array.dtype for array in found] == ["float64", "float32"]
    close(found, jax.grad(product(reference, more["index"]), (0, 1))(x, more["w"]))


def test_what_a_package_cannot_differentiate_is_an_error_that_says_what_to_do(tree):
    x, more = arguments(5, 3, 6)
    f, w = load(tree), more["w"]
    several, one = product(f, more["index"]), one_number(f, more["index"])
    refused = {
        "forward mode": lambda: jax.jvp(lambda x: several(x, w), (x,), (x,)),
        "a Hessian": lambda: jax.hessian(one)(x, w),
        "twice in reverse": lambda: jax.grad(lambda x: jax.grad(several)(x, w).sum())(x),
    }
    for call in refused.values():
        with pytest.raises(
            NotImplementedError,
            match=r"torchcall: Tree \(tree.pt2\): cannot be "
            "differentiated: .* one derivative .* in reverse mode .* wrap the module itself",
        ):
            call()  # fmt: skip


def changed(package, path, change):
    """A copy of a package with other metadata."""
    with zipfile.ZipFile(package) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("metadata.json"):
                fields = json.loads(content)
                own = json.loads(fields["torchcall"])
                change(own)
                content = json.dumps(fields | {"torchcall": json.dumps(own)}).encode()
            new.writestr(name, content)
    return path


def test_a_package_without_these_gradients_names_the_options(tree, tmp_path):
    x, more = arguments(5, 3, 6)
    without = load(changed(tree, tmp_path / "a.pt2", lambda own: own.pop("gradients")))
    close(without(x, more), reference(x, more))
    with pytest.raises(
        NotImplementedError,
        match=r"torchcall.compile\(\.\.\., gradients=True\).*"
        r"torchcall.mliap.compile\(\.\.\., second_derivatives=True\)",
    ):
        jax.grad(product(without, more["index"]))(x, more["w"])  # fmt: skip
    only_x = load(changed(tree, tmp_path / "b.pt2", lambda own: own["gradients"].pop()))
    with pytest.raises(
        NotImplementedError,
        match=r"operand args\[1\]\['w'\]: expected an input "
        ".* gradients=True, or apply jax.lax.stop_gradient",
    ):
        jax.grad(product(only_x, more["index"]), 1)(x, more["w"])  # fmt: skip


@pytest.mark.parametrize(
    "change, part",
    [
        (lambda own: own.update(gradients=["args[1]['index']"]), "'gradients': "),
        (lambda own: own.update(gradients="args[0]"), "'gradients': 'args"),
        (lambda own: own["outputs"][0].update(shape=["n9", 3]), "'outputs'"),
    ],
)
def test_damaged_metadata_of_gradients_are_refused(tree, tmp_path, change, part):
    with pytest.raises(ValueError, match="torchcall: .*" + part):
        torchcall.load(changed(tree, tmp_path / "a.pt2", change))


def test_a_package_that_lost_its_derivative_is_refused(tree, tmp_path):
    path = tmp_path / "a.pt2"
    with zipfile.ZipFile(tree) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if "aotinductor/derivative" not in name:
                new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="gradients but without a model named 'derivative'"):
        torchcall.load(path)


def test_a_file_that_changed_gives_its_gradients_after_refresh(tree, tmp_path):
    path = tmp_path / "tree.pt2"
    shutil.copyfile(tree, path)
    f = load(path)
    x, more = arguments(5, 3, 6)
    close(f(x, more), reference(x, more))
    os.replace(shutil.copyfile(tree, tmp_path / "new.pt2"), path)
    gradient = jax.grad(product(f, more["index"]))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=r"call refresh\(\)"):
        gradient(x, more["w"])
    f.refresh()
    close(gradient(x, more["w"]), jax.grad(product(reference, more["index"]))(x, more["w"]))


@pytest.mark.slow
def test_gradients_are_exported_for_every_size(tree):
    f = load(tree)

    def gradients(f):
        def total(x, more):
            out = f(x, more)
            return (out["rows"] ** 3).sum() * out["total"]

        return jax.jit(jax.grad(total))

    n, k, m = export.symbolic_shape("n, k, m", constraints=["n >= 2", "k >= 2", "m >= 2"])
    more = {
        "index": jax.ShapeDtypeStruct((k,), np.int32),
        "w": jax.ShapeDtypeStruct((m, 2), np.float32),
    }
    program = export.export(gradients(f), disabled_checks=torchcall.export_checks())
    made = program(jax.ShapeDtypeStruct((n, 4), np.float32), more)
    again = export.deserialize(made.serialize())
    for sizes in ((9, 14, 2), (5, 3, 6)):
        x, more = arguments(*sizes)
        more["index"] = more["index"].astype(np.int32)
        np.testing.assert_allclose(
            again.call(x, more), gradients(reference)(x, more), rtol=2e-4, atol=1e-5
        )
