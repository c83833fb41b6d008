"""`torchcall.compile` compiles any module into a package that `torchcall.load` loads."""

import pickle
import warnings
import zipfile
from pathlib import Path

import compiled_tree
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compiled_tree import arguments, load, reference
from models import run_python

import torchcall
from torchcall.mliap import TorchMliap


@pytest.mark.parametrize("sizes", [(5, 3, 6), (2, 7, 2), (40, 9, 31)])
def test_a_package_returns_the_modules_results_for_any_sizes(tree, sizes):
    args = arguments(*sizes)
    found = jax.jit(load(tree))(*args)
    expected = reference(*args)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)


def test_a_package_is_mapped_one_by_one(tree):
    f = load(tree)
    x, more = arguments(5, 3, 6)
    xs = np.stack([x, 2 * x])
    found = jax.jit(jax.vmap(f, (0, None)))(xs, more)
    for k, one in enumerate(xs):
        expected = reference(one, more)
        jax.tree.map(
            lambda a, b, k=k: np.testing.assert_allclose(a[k], b, rtol=1e-5), found, expected
        )
    with pytest.raises(ValueError, match="vmap_method: expected 'sequential' for a model"):
        load(tree, vmap_method="expand_dims")


ON_EIGHT_DEVICES = """
    import sys
    sys.path.insert(0, {here!r})
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import PartitionSpec as P
    from compiled_tree import arguments, load, reference

    f = load({path!r}, sharding_rule="n a, k, m c -> k b, c, , ")
    x, more = arguments(5, 3, 6)
    xs = np.stack([k * x for k in range(8)])
    expected = jax.tree.map(lambda *rows: np.stack(rows), *[reference(x, more) for x in xs])
    one = lambda xs, more: jax.tree.map(lambda out: out[None], f(xs[0], more))
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, P("i"))
    mapped = jax.shard_map(one, mesh=mesh, in_specs=(P("i"), P()), out_specs=P("i"))
    calls = {{
        "shard_map": jax.jit(mapped),
        "pmap": jax.pmap(f, in_axes=(0, None)),
        "jit": jax.jit(jax.vmap(f, (0, None))),
    }}
    for name, call in calls.items():
        before = f.stats()["calls"]
        found = jax.block_until_ready(call(jax.device_put(xs, split), more))
        assert f.stats()["calls"] == before + 8, name
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)
    print("done")
"""


def test_devices_divide_calls_of_a_package(tree, tmp_path):
    program = ON_EIGHT_DEVICES.format(here=str(Path(compiled_tree.__file__).parent), path=str(tree))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    assert run_python(tmp_path, program, **flags).stdout == "done\n"


def test_wrong_arguments_are_errors_that_name_the_operand(tree):
    f = load(tree)
    x, more = arguments(5, 3, 6)
    cases = {
        r"args\[0\]: expected float32 \(n0, 4\), got float32 \(5, 3\)": (x[:, :3], more),
        r"args\[0\]: expected .* got int32 \(5, 4\)": (x.astype(np.int32), more),
        r"args\[0\]: expected .* with n0 >= 2, got float32 \(1, 4\)": (x[:1], more),
    }
    for message, args in cases.items():
        with pytest.raises(ValueError, match=f"torchcall: Tree .*{message}"):
            f(*args)


def test_a_wrapper_of_a_package_pickles_by_its_path(tree):
    args = arguments(5, 3, 6)
    f = load(tree)
    copy = pickle.loads(pickle.dumps(f))
    np.testing.assert_array_equal(copy(*args)["rows"], f(*args)["rows"])


def test_from_package_refuses_a_package_that_is_not_a_potential(tree):
    with pytest.raises(ValueError, match=r"expected a package made by torchcall\.mliap\.compile"):
        TorchMliap.from_package(tree)


class Module(torch.nn.Module):
    """A module that calls `function`, with one buffer."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("weight", torch.tensor(2.0, dtype=torch.float64))

    def forward(self, *args):
        return self.function(self, *args)


def differentiating(self, x):
    x = x.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad((self.weight * x**3).sum(), x)
    return gradient


def writing(self, x):
    x.add_(1.0)
    return x * self.weight


def shapes_of(metadata):
    return [row["shape"] for row in metadata["inputs"]]


@pytest.mark.parametrize(
    "function, example, shapes",
    [
        (lambda self, x: x * self.weight, (np.ones((3, 5)),), [["n0", "n1"]]),
        (lambda _, x, y: x @ y, (np.ones((3, 5)), np.ones(5)), [["n0", "n1"], ["n1"]]),
        (lambda self, x: x.reshape(-1, 3) * self.weight, (np.ones(9),), [[9]]),
        (lambda _, x: x * (2 if x.shape[0] == 5 else 3), (np.ones(4),), [[4]]),
        (lambda _, x, y: torch.cat([x, y]), (np.ones(4), np.ones(6)), [[4], [6]]),
        (lambda self, x: x * self.weight, (np.float64(3.0),), [[]]),
        (differentiating, (np.arange(6.0),), None),
        (writing, (np.ones(4),), [["n0"]]),
    ],
    ids=["any sizes", "equal", "a multiple", "a branch", "a sum", "scalar", "gradients", "writes"],
)  # fmt: skip
def test_axes_may_vary_if_the_module_allows_it(function, example, shapes, uncompiled, tmp_path):
    module = Module(function)
    torchcall.compile(module, tmp_path / "m.pt2", example=example)
    (metadata,) = uncompiled
    assert shapes is None or shapes_of(metadata) == shapes
    assert metadata["user"] == {}
    if shapes is None or any(isinstance(size, str) for shape in shapes for size in shape):
        torchcall.compile(module, tmp_path / "m.pt2", example=example, dynamic=True)
    else:
        with pytest.raises(torchcall.CompileError, match="supports other sizes than the example's"):
            torchcall.compile(module, tmp_path / "m.pt2", example=example, dynamic=True)
    torchcall.compile(module, tmp_path / "m.pt2", example=example, dynamic=False)
    assert shapes_of(uncompiled[-1]) == [list(np.shape(array)) for array in example]


def test_the_range_of_sizes_for_which_a_branch_is_valid_is_recorded(uncompiled, tmp_path):
    module = Module(lambda self, x: x * self.weight if x.shape[0] > 5 else x * 3)
    torchcall.compile(module, tmp_path / "m.pt2", example=(np.ones(8),))
    assert uncompiled[0]["axes"] == {"n0": {"minimum": 6, "maximum": None, "capacity": None}}


@pytest.mark.parametrize(
    "function, example, message",
    [
        (lambda _, x: x, [np.ones(3)], "example: expected a tuple of the positional arguments"),
        (lambda _, x: x, (), "example: expected a tuple .* with at least one array"),
        (lambda _, x: x, ({"a": 3},), r"example\[0\]\['a'\]: expected an array .* got int"),
        (lambda _, x: x, (np.ones(2, "U1"),), r"example\[0\]: expected an array .* dtype <U1"),
        (lambda *_: {"y": 3}, (np.ones(3),), r"output\['y'\]: expected a tensor, got int"),
        (lambda _, x: x @ x.T.T @ x, (np.ones((2, 3)),), "called with the example, got an error"),
        (lambda _, x: x * torch.rand(()), (np.ones(3),), "got different ones: .* random numbers"),
        (lambda self, x: x * self.weight.add_(1.0), (np.ones(3),), "changes its buffers"),
    ],
)
def test_a_module_that_cannot_be_compiled_is_an_error_that_says_why(
    function, example, message, uncompiled, tmp_path
):
    del uncompiled
    with pytest.raises((TypeError, torchcall.CompileError), match="torchcall: .*" + message):
        torchcall.compile(Module(function), tmp_path / "m.pt2", example=example)
    assert not (tmp_path / "m.pt2").exists()


class Returns(torch.nn.Module):
    """Calls a function on its argument."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function, example, text",
    [
        (lambda x: [{"a": x, 1: x}], jnp.ones(3), "Returns: output[0]: expected"),
        (lambda x: x["a"], {"d": {"a": jnp.ones(3), 1: jnp.ones(3)}}, "example[0]['d']: expected"),
    ],
    ids=["result", "argument"],
)
def test_dict_with_keys_of_two_types_is_not_compiled(function, example, text, uncompiled, tmp_path):
    with pytest.raises(ValueError, match="keys of one type, got the keys") as caught:
        torchcall.compile(Returns(function), tmp_path / "m.pt2", example=(example,))
    assert text in str(caught.value)
    assert not uncompiled


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A package that torchcall did not make."""
    path = tmp_path_factory.mktemp("foreign") / "m.pt2"
    module = Returns(lambda x: {"a": 2 * x["b"] - x["a"]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        program = torch.export.export(module, ({"b": torch.ones(3), "a": torch.ones(3)},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


@pytest.mark.slow
def test_an_output_spec_with_keys_of_two_types_is_an_error_for_a_package(foreign):
    x = np.ones(3, np.float32)
    spec = jax.ShapeDtypeStruct((3,), np.float32)
    f = torchcall.load(foreign, output_spec={"a": spec, 1: spec})
    with pytest.raises(ValueError, match="output_spec: expected a dict with keys of one type"):
        f({"a": x, "b": x})


@pytest.mark.slow
def test_errors_of_a_package_of_another_origin_name_the_operand(foreign, capfd):
    x = np.ones(3, np.float32)
    f = torchcall.load(foreign, output_spec={"a": jax.ShapeDtypeStruct((3,), np.float32)})
    for wrong in (x.astype(np.int32), np.ones(4, np.float32)):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            f({"a": x, "b": wrong})
        text, printed = str(caught.value), capfd.readouterr().err
        if torch.__version__ < "2.13":  # which returns no reason
            assert "torchcall: m.pt2: raised: " in text
            assert "has printed the reason to standard error" in text
            assert "input_handles[0]: unmatched" in printed
        else:
            assert "torchcall: m.pt2: raised: operand args[0]['b']: unmatched" in text


def test_examples_may_be_jax_arrays_in_half_precision(uncompiled, tmp_path):
    example = ([jnp.ones((3, 2), jnp.bfloat16)], jnp.arange(4, dtype=jnp.int32))
    module = Module(lambda _, a, b: (a[0] * 2, b + 1))
    torchcall.compile(module, tmp_path / "m.pt2", example=example)
    assert [row["dtype"] for row in uncompiled[0]["outputs"]] == ["bfloat16", "int32"]


class RowSums(torch.nn.Module):
    def forward(self, x, rows):
        return torch.zeros_like(x[:100]).index_add(0, rows, x.sin())


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [False, True])
def test_only_parallel_packages_have_parallel_loops(parallel, tmp_path):
    torch.set_num_threads(1 if parallel else 2)  # a fixture restores it
    x = torch.linspace(0, 1, 200_000).reshape(-1, 8)
    rows = torch.arange(len(x)) % 100
    path = torchcall.compile(
        RowSums(), tmp_path / "m.pt2", example=(x, rows), parallel=parallel, cache=False
    )
    with zipfile.ZipFile(path) as archive:
        sources = [name for name in archive.namelist() if name.endswith(".cpp")]
        code = "".join(archive.read(name).decode() for name in sources)
    assert ("#pragma omp parallel" in code) is parallel
    assert "num_threads(" not in code.replace("omp_get_num_threads()", "")
    casts = ((None, torch.int64), {})
    for threads in (1, 2):
        f = torchcall.load(path, threads=threads, input_spec=casts)
        found = f(x.numpy(), rows.numpy())
        np.testing.assert_allclose(found, RowSums()(x, rows), rtol=1e-4)
