"""Outputs: inferred without running the model or declared by the user, and always checked."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import Counter, Linear, assert_same, double, error_of, like_input, torch_of
from torch import Tensor, nn

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)
F32 = np.dtype("float32")


def spec(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def one(x: Tensor) -> Tensor:
    return x + 1


def pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x + 1, x.sum()


def named(x: Tensor) -> Pair:
    return Pair(x + 1, x.sum())


def listed(x: Tensor) -> list[Tensor]:
    return [x + 1, x.sum()]


def keyed(x: Tensor) -> dict[str, Tensor]:
    return {"z": x + 1, "a": x.sum()}


def keyed_by_int(x: Tensor) -> dict[int, Tensor]:
    return {7: x + 1, -2: x.sum()}


def nested(x: Tensor) -> dict[str, tuple[Tensor, list[Tensor]]]:
    return {"b": (x, [x.sum(), x.t()]), "a": (x[0], [x])}


def optional(x: Tensor) -> tuple[Tensor, Tensor | None]:
    return x + 1, None


def single(x: Tensor) -> tuple[Tensor]:
    return (x + 1,)


def nothing(x: Tensor) -> list[Tensor]:
    return [x][1:]


@pytest.mark.parametrize(
    "function",
    [one, pair, listed, keyed, keyed_by_int, nested, optional, single, nothing],
    ids=lambda f: f.__name__.replace("_", " "),
)
def test_output_has_the_structure_that_the_model_returns(function):
    f = TorchModuleWrapper(torch.jit.script(function))
    expected = function(torch_of(X))
    assert_same(f(X), expected)
    assert_same(jax.jit(f)(X), expected)
    assert jax.tree.structure(jax.eval_shape(f, X)) == jax.tree.structure(expected)


def test_named_tuple_output_has_the_models_field_names():
    got = jax.jit(TorchModuleWrapper(torch.jit.script(named)))(X)
    assert_same((got.first, got.second), (X + 1, X.sum()))
    assert got._fields == ("first", "second")


def test_named_tuple_output_has_the_same_type_in_every_call():
    f = TorchModuleWrapper(torch.jit.script(named))
    program = jax.jit(lambda p, x: jax.lax.cond(p, f, lambda x: f(x * 2), x))
    np.testing.assert_array_equal(program(False, X).first, 2 * X + 1)
    small, large = f(X[:1]), f(X)
    assert jax.tree.structure(small) == jax.tree.structure(large)


class DrawsAndCounts(nn.Module):
    calls: int
    seen: list[int]

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.seen = [0]
        self.last = torch.zeros(3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.last = x[0]
        self.total.add_(x.sum())
        return self.norm(x) + torch.rand(3) + torch.nn.functional.dropout(x, 0.5)


def test_inferring_outputs_neither_runs_nor_changes_the_model():
    module = torch.jit.script(DrawsAndCounts())  # in training mode
    before = {k: v.clone() for k, v in module.state_dict().items()}
    last, random_state = module.last, torch.get_rng_state()
    f = TorchModuleWrapper(module)
    for rows in (2, 3, 4):
        assert jax.eval_shape(f, spec(rows, 3)) == spec(rows, 3)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module.calls == 0
    assert module.seen == [0]
    assert type(module.last) is Tensor
    assert torch.equal(module.last, last)
    for name, value in module.state_dict().items():
        assert type(value) is Tensor
        assert torch.equal(value, before[name]), name
    module.eval()
    module(torch.ones(2, 3))  # torch can still call it
    assert module.calls == 1


class CalibratesOnFirstInput(nn.Module):
    scale: float

    def __init__(self) -> None:
        super().__init__()
        self.scale = -1.0

    def forward(self, x: Tensor) -> Tensor:
        if self.scale < 0:
            self.scale = float(x.max())
        return x / self.scale


def test_model_that_calibrates_on_its_first_input_sees_only_real_data():
    f = TorchModuleWrapper(torch.jit.script(CalibratesOnFirstInput()), output_spec=like_input)
    assert_same(f(X + 5), (X + 5) / 10)
    assert_same(f(X), X / 10)


def test_model_that_branches_on_values_gets_an_error_that_names_output_spec():
    f = TorchModuleWrapper(torch.jit.script(CalibratesOnFirstInput()))
    text = error_of(lambda: f(X))
    assert "torchcall: CalibratesOnFirstInput: " in text
    assert "output_spec=" in text


def test_output_spec_given_as_a_pytree_replaces_inference():
    f = TorchModuleWrapper(torch.jit.script(keyed), output_spec={"z": spec(2, 3), "a": spec()})
    assert_same(f(X), keyed(torch_of(X)))


def test_output_spec_given_as_a_function_receives_the_specs_of_the_inputs():
    seen = []

    def output_spec(x, n, *, flag):
        seen.append((x, n, flag))
        return spec(*x.shape, n)

    f = TorchModuleWrapper(torch.jit.script(repeats), output_spec=output_spec)
    assert_same(f(X, 4, flag=True), np.repeat(X[..., None], 4, -1))
    assert seen == [(spec(2, 3), 4, True)]


def repeats(x: Tensor, n: int, flag: bool) -> Tensor:
    return x.unsqueeze(-1).repeat(1, 1, n if flag else 1)


def test_output_spec_may_contain_arrays_and_named_tuples():
    f = TorchModuleWrapper(
        torch.jit.script(named), output_spec=Pair(jnp.zeros((2, 3)), np.float32(0))
    )
    got = f(X)
    assert isinstance(got, Pair)
    assert_same(tuple(got), (X + 1, X.sum()))


def test_output_spec_may_contain_none_for_an_optional_output():
    f = TorchModuleWrapper(torch.jit.script(optional), output_spec=(spec(2, 3), None))
    assert_same(f(X), (X + 1, None))


MISMATCHES = [
    pytest.param(one, spec(2, 4), ["float32 (2, 4)", "float32 (2, 3)"], id="wrong size"),
    pytest.param(one, spec(1), ["float32 (1,)", "float32 (2, 3)"], id="wrong rank"),
    pytest.param(one, spec(1, 2, 3), ["float32 (1, 2, 3)", "(2, 3)"], id="would broadcast"),
    pytest.param(one, spec(2, 3, dtype="float16"), ["float16 (2, 3)", "float32"], id="wrong dtype"),
    pytest.param(one, spec(2, 3, dtype="int32"), ["int32 (2, 3)", "float32"], id="int for float"),
    pytest.param(one, spec(3, 2), ["(3, 2)", "(2, 3)"], id="transposed"),
    pytest.param(pair, (spec(2, 3), spec(1)), ["[1]", "float32 (1,)", "float32 ()"], id="scalar"),
    pytest.param(one, (spec(2, 3),), ["a tuple", "Tensor"], id="tuple for a tensor"),
    pytest.param(pair, spec(2, 3), ["a tensor", "Tuple"], id="tensor for a tuple"),
    pytest.param(pair, (spec(2, 3),), ["a tuple of 1", "a tuple of 2"], id="too many"),
    pytest.param(pair, (spec(2, 3), spec(), spec()), ["tuple of 3", "tuple of 2"], id="too few"),
    pytest.param(listed, [spec(2, 3)], ["a list of 1", "a list of 2"], id="list too long"),
    pytest.param(listed, (spec(2, 3), spec()), ["a tuple", "List"], id="tuple for a list"),
    pytest.param(keyed, {"z": spec(2, 3)}, ["1 keys", "'z'", "'a'"], id="an extra key"),
    pytest.param(keyed, {"z": spec(2, 3), "b": spec()}, ["['b']", "'a'"], id="a missing key"),
    pytest.param(
        keyed, {"z": spec(2, 3), "a": spec(5)}, ["['a']", "(5,)", "()"], id="wrong shape in a dict"
    ),
    pytest.param(
        nested,
        {"a": (spec(3), [spec(2, 3)]), "b": (spec(2, 3), [spec(), spec(2, 3)])},
        ["['b'][1][1]", "(2, 3)", "(3, 2)"],
        id="wrong shape of a deeply nested leaf",
    ),
    pytest.param(
        optional, (spec(2, 3), spec()), ["[1]", "a tensor", "None"], id="None for a tensor"
    ),
    pytest.param(pair, (spec(2, 3), None), ["[1]", "None", "Tensor"], id="tensor for None"),
]


@pytest.mark.parametrize("function, output_spec, parts", MISMATCHES)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eagerly", "under jit"])
def test_output_that_differs_from_the_plan_is_an_error(function, output_spec, parts, wrap):
    f = wrap(TorchModuleWrapper(torch.jit.script(function), output_spec=output_spec))
    for _ in range(2):
        text = error_of(lambda: f(X))
        assert f"torchcall: {function.__name__}: output" in text
        assert "expected" in text
        assert "got" in text
        for part in parts:
            assert part in text
    assert_same(TorchModuleWrapper(torch.jit.script(double))(X), 2 * X)


class GrowsAtRuntime(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[x > 2]


def test_output_whose_shape_depends_on_values_is_checked_in_every_call():
    f = TorchModuleWrapper(torch.jit.script(GrowsAtRuntime()), output_spec=spec(3))
    assert_same(f(X), X[X > 2])
    text = error_of(lambda: f(X + 1))
    assert text.endswith(": expected float32 (3,), got float32 (4,)")
    assert_same(f(X), X[X > 2])


class ReturnsSparse(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to_sparse()


class ReturnsMeta(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, device=torch.device("meta"))


@pytest.mark.parametrize("module", [ReturnsSparse(), ReturnsMeta()], ids=["sparse", "meta"])
def test_output_that_is_not_a_dense_cpu_tensor_is_an_error(module):
    f = TorchModuleWrapper(torch.jit.script(module), output_spec=like_input)
    text = error_of(lambda: f(X))
    assert "output" in text
    assert "dense" in text


def a_float(x: Tensor) -> float:
    return 1.5 * x.dim()


def with_an_int(x: Tensor) -> tuple[Tensor, int]:
    return x, 3


def a_string(x: Tensor) -> dict[str, str]:
    return {"k": str(x.dim())}


@pytest.mark.parametrize(
    "function, got", [(a_float, "float"), (with_an_int, "int"), (a_string, "str")]
)
@pytest.mark.parametrize("output_spec", [None, "given"])
def test_output_that_is_not_a_tensor_is_an_error(function, got, output_spec):
    tree = {"float": spec(), "int": (spec(2, 3), spec()), "str": {"k": spec()}}[got]
    f = TorchModuleWrapper(torch.jit.script(function), output_spec=tree if output_spec else None)
    text = error_of(lambda: f(X))
    assert "output" in text
    assert "a tensor" in text
    assert got in text


@pytest.mark.parametrize(
    "output_spec, part",
    [
        ("float32", "str"),
        (spec(2, 3, dtype="uint16"), "uint16"),
        ([spec(2), 3], "int"),
        ({("a", "b"): spec(2)}, "keys"),
    ],
    ids=["a string", "a dtype that torch lacks", "an int leaf", "a tuple as key"],
)
def test_invalid_output_spec_is_an_error(output_spec, part):
    f = TorchModuleWrapper(torch.jit.script(one), output_spec=output_spec)
    text = error_of(lambda: f(X))
    assert "torchcall: one: output" in text
    assert part in text


def to_double(x: Tensor) -> dict[str, Tensor]:
    return {"energy": x.double().sum(), "index": x.long()}


@pytest.mark.parametrize("given", [False, True], ids=["inferred", "given"])
def test_output_that_needs_x64_is_an_error_that_names_the_option(given):
    tree = {"energy": spec(dtype="float64"), "index": spec(2, 3, dtype="int64")} if given else None
    f = TorchModuleWrapper(torch.jit.script(to_double), output_spec=tree)
    text = error_of(lambda: f(X))
    assert "output ['energy']" in text
    assert "float64 ()" in text
    assert "jax_enable_x64" in text
    with jax.enable_x64(True):
        assert_same(f(X), to_double(torch_of(X)))


def test_weights_that_a_model_returns_are_copied():
    module = torch.jit.script(ReturnsWeight())
    f = TorchModuleWrapper(module)
    got = f(X)
    assert_same(got, torch.full((3,), 4.0))
    with torch.no_grad():
        module.weight.fill_(5.0)
    assert_same(got, torch.full((3,), 4.0))


class ReturnsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 4.0))

    def forward(self, x: Tensor) -> Tensor:  # noqa: ARG002
        return self.weight


def test_inferring_outputs_does_not_count_as_a_call():
    module = torch.jit.script(Counter())
    f = TorchModuleWrapper(module)
    jax.eval_shape(f, X)
    assert f.stats()["calls"] == 0
    assert_same(f(X), X + 1)
    assert_same(TorchModuleWrapper(torch.jit.script(Linear()))(X), Linear()(torch_of(X)))


@pytest.mark.parametrize("nothing", [(), {}, lambda _: None], ids=["()", "{}", "a function"])
def test_output_spec_without_an_output_is_an_error(nothing):
    text = error_of(lambda: TorchModuleWrapper(torch.jit.script(double), output_spec=nothing)(X))
    assert "torchcall: double: output_spec: expected at least one jax.ShapeDtypeStruct" in text


def test_output_spec_that_raises_or_has_a_negative_size_is_an_error_that_names_it():
    scripted = torch.jit.script(double)
    text = error_of(lambda: TorchModuleWrapper(scripted, output_spec=lambda _: 1 / 0)(X))
    assert "torchcall: double: output_spec: the function raised ZeroDivisionError" in text
    text = error_of(lambda: TorchModuleWrapper(scripted, output_spec=spec(-1))(X))
    assert "expected sizes >= 0, got (-1,)" in text


def test_repr_works_with_arrays_in_output_spec():
    f = TorchModuleWrapper(torch.jit.script(double), output_spec=np.ones((2, 3), np.float32))
    assert "output_spec=" in repr(f)
    assert_same(f(X), 2 * X)
