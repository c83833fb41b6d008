"""Pytrees of arrays and Python scalars as the arguments of a model."""

import enum
import math
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import assert_same, error_of, subtract, torch_of
from torch import Tensor, nn

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)
Y, Z = X * 10, X * 100 + 1


class Point(NamedTuple):
    x: Tensor
    y: Tensor


def of_dict(d: dict[str, Tensor]) -> Tensor:
    return d["x"] - 2 * d["y"] + 3 * d["z"]


def of_int_dict(d: dict[int, Tensor]) -> Tensor:
    return d[10] - 2 * d[2]


def of_list(xs: list[Tensor]) -> Tensor:
    total = torch.zeros_like(xs[0])
    for i, x in enumerate(xs):
        total = total + (i + 1) * x
    return total


def of_tuple(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0] - 2 * pair[1]


def of_named_tuple(point: Point) -> Tensor:
    return point.x - 2 * point.y


def of_nested(tree: dict[str, list[tuple[Tensor, dict[str, Tensor]]]], last: Tensor) -> Tensor:
    total = last * 1
    for x, d in tree["b"]:
        total = total + x - 2 * d["k"]
    for x, d in tree["a"]:
        total = total * 3 + x - d["k"]
    return total


CALLS = [
    pytest.param(of_dict, ({"z": Z, "x": X, "y": Y},), id="a dict in any order"),
    pytest.param(of_dict, (OrderedDict(z=Z, y=Y, x=X),), id="an ordered dict"),
    pytest.param(of_int_dict, ({10: X, 2: Y},), id="a dict keyed by int"),
    pytest.param(of_list, ([X, Y, Z],), id="a list"),
    pytest.param(of_list, ([X] * 40,), id="a list of forty"),
    pytest.param(of_tuple, ((X, Y),), id="a tuple"),
    pytest.param(of_named_tuple, (Point(y=Y, x=X),), id="a named tuple"),
    pytest.param(
        of_nested, ({"a": [(X, {"k": Y})], "b": [(Y, {"k": Z}), (Z, {"k": X})]}, Y), id="nested"
    ),
    pytest.param(of_nested, ({"a": [], "b": []}, Y), id="empty lists"),
]


@pytest.mark.parametrize("function, args", CALLS)
def test_pytree_reaches_the_model_unchanged(function, args):
    f = TorchModuleWrapper(torch.jit.script(function))
    expected = function(*jax.tree.map(torch_of, args))
    assert_same(f(*args), expected)
    assert_same(jax.jit(f)(*jax.tree.map(jnp.asarray, args)), expected)


def describe(x: Tensor, b: bool, i: int, r: float, s: str, n: int | None) -> Tensor:
    value = r * 100 + i * 10 + (1 if b else 0) + len(s) * 1000
    return x * 0 + value + (-1 if n is None else n)


def test_static_scalars_reach_the_model_unchanged():
    f = TorchModuleWrapper(torch.jit.script(describe))
    for args in [
        (True, 2, 3.5, "four", None),
        (False, -2, 3.5, "", 7),
        (True, 2**53 + 1, 0.5, "é😀", None),
    ]:
        assert_same(f(X, *args), describe(torch_of(X), *args))
    assert f.stats()["plans"] == 3


def number(x: Tensor, n: int | float | bool) -> Tensor:
    if isinstance(n, bool):
        return x * 0 + 1
    if isinstance(n, int):
        return x * 0 + 2
    return x * 0 + 3


def test_true_one_and_one_point_zero_are_three_different_arguments():
    f = TorchModuleWrapper(torch.jit.script(number))
    for _ in range(2):
        for value, expected in [(True, 1), (1, 2), (1.0, 3)]:
            assert_same(f(X, value), np.full_like(X, expected))
            assert_same(jax.jit(f, static_argnums=1)(X, value), np.full_like(X, expected))
    assert f.stats()["plans"] == 3


def scaled(x: Tensor, r: float) -> Tensor:
    return x * r


def sign(x: Tensor, r: float) -> Tensor:
    return x * 0 + torch.copysign(torch.ones(2, 3), torch.full([2, 3], r))


def test_special_floats_work_as_static_scalars():
    f = TorchModuleWrapper(torch.jit.script(scaled))
    for value in (math.nan, math.inf, -math.inf, 1e308, 5e-324, 0.1):
        with np.errstate(all="ignore"):
            assert_same(f(X, value), scaled(torch_of(X), value))
    plans = f.stats()["plans"]
    for _ in range(3):
        f(X, float("nan"))
    assert f.stats()["plans"] == plans
    g = TorchModuleWrapper(torch.jit.script(sign))
    assert_same(g(X, 0.0), np.ones_like(X))
    assert_same(g(X, -0.0), -np.ones_like(X))


def test_an_int_is_accepted_where_a_float_is_expected():
    f = TorchModuleWrapper(torch.jit.script(scaled))
    assert_same(f(X, 3), scaled(torch_of(X), 3))


def times(x: Tensor, n: int) -> Tensor:
    return x * n


class Order(enum.IntEnum):
    THIRD = 3


def test_int_enum_is_passed_as_an_int():
    assert_same(TorchModuleWrapper(torch.jit.script(times))(X, Order.THIRD), X * 3)


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**200], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["inferred", "with an output_spec"])
def test_int_beyond_64_bits_is_an_error_that_names_it(value, given):
    spec = (lambda x, _: x) if given else None
    f = TorchModuleWrapper(torch.jit.script(times), output_spec=spec)
    text = error_of(lambda: f(X, value))
    assert "operand args[1]" in text
    assert str(value) in text
    assert "64" in text
    assert_same(f(X, 2**62), times(torch_of(X), 2**62))


def length(x: Tensor, s: str) -> Tensor:
    return x * 0 + len(s)


def test_string_with_a_nul_character_is_not_truncated():
    f = TorchModuleWrapper(torch.jit.script(length))
    assert_same(f(X, "ab\0cd"), np.full_like(X, 5))


def test_string_that_is_not_valid_utf8_is_an_error_that_names_the_operand():
    f = TorchModuleWrapper(torch.jit.script(length))
    text = error_of(lambda: f(X, "\ud800"))
    assert "operand args[1]" in text
    assert "incompatible function arguments" not in text


def of_static_lists(x: Tensor, sizes: list[int], names: dict[str, float], t: tuple[int, str]):
    total = float(t[0] + len(t[1]))
    for i, size in enumerate(sizes):
        total += (i + 1) * size
    return x * total * names["scale"]


def test_containers_of_static_scalars_reach_the_model():
    f = TorchModuleWrapper(torch.jit.script(of_static_lists))
    args = [1, 2, 3], {"scale": 0.5}, (4, "ab")
    assert_same(f(X, *args), of_static_lists(torch_of(X), *args))


def with_defaults(
    x: Tensor, y: Tensor | None = None, scale: float = 2.0, shift: int = 1, flag: bool = False
) -> Tensor:
    x = x * scale + shift
    if y is not None:
        x = x - y
    if flag:
        x = -x
    return x


@pytest.mark.parametrize(
    "args, kwargs",
    [
        ((X,), {}),
        ((X, Y), {}),
        ((X, None), {}),
        ((X, None, 3.0), {"flag": True}),
        ((X,), {"y": Y}),
        ((X,), {"shift": 5, "y": Y}),
        ((), {"flag": True, "y": None, "x": X}),
    ],
    ids=[
        "all defaults",
        "an optional array by position",
        "None by position",
        "None and a keyword",
        "an optional array by name",
        "two keywords",
        "everything by name",
    ],
)
def test_defaults_keywords_and_optional_arguments_work_as_in_python(args, kwargs):
    f = TorchModuleWrapper(torch.jit.script(with_defaults))
    expected = with_defaults(*jax.tree.map(torch_of, args), **_torch(kwargs))
    assert_same(f(*args, **kwargs), expected)


def _torch(kwargs):
    return {k: torch_of(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}


def test_one_wrapper_can_be_called_with_and_without_an_optional_argument():
    f = TorchModuleWrapper(torch.jit.script(with_defaults))
    for _ in range(2):
        assert_same(f(X, Y), with_defaults(torch_of(X), torch_of(Y)))
        assert_same(f(X), with_defaults(torch_of(X)))
    assert f.stats()["plans"] == 2


class Method(nn.Module):
    def forward(self, pos: Tensor, cell: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return pos * scale if cell is None else pos @ cell * scale


def test_methods_take_keywords_like_functions():
    f = TorchModuleWrapper(torch.jit.script(Method()))
    cell = np.eye(3, dtype=np.float32) * 2
    assert_same(jax.jit(f)(X, cell=cell), X * 2)
    assert_same(f(cell=cell, pos=X, scale=0.5), X)


@jax.tree_util.register_pytree_node_class
class Custom:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def tree_flatten(self):
        return (self.x, self.y), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


BAD_CALLS = [
    pytest.param((X,), {}, ["'y'", "Tensor", "nothing"], id="a missing argument"),
    pytest.param((X, Y, Z), {}, ["2", "3"], id="one argument too many"),
    pytest.param((X, Y), {"z": Y}, ["kwargs['z']"], id="an unknown keyword"),
    pytest.param((X, Y), {"y": Y}, ["kwargs['y']", "got two"], id="an argument given twice"),
    pytest.param((X, 1.0), {}, ["args[1]", "Tensor", "float"], id="a scalar for a tensor"),
    pytest.param((X, None), {}, ["args[1]", "Tensor", "None"], id="None for a tensor"),
    pytest.param((X, [Y]), {}, ["args[1]", "Tensor", "list"], id="a list for a tensor"),
    pytest.param(({"a": X}, Y), {}, ["args[0]", "Tensor", "dict"], id="a dict for a tensor"),
    pytest.param((X, 1j), {}, ["args[1]", "complex"], id="a complex scalar"),
    pytest.param((X, b"b"), {}, ["args[1]", "bytes"], id="bytes"),
    pytest.param((X, object()), {}, ["args[1]", "object"], id="an object"),
    pytest.param((X, {3}), {}, ["args[1]", "set"], id="a set"),
    pytest.param((X, torch.ones(2)), {}, ["args[1]", "torch.Tensor"], id="a torch tensor"),
    pytest.param((X, Custom(X, Y)), {}, ["args[1]", "Custom"], id="a custom pytree node"),
    pytest.param((Custom(X, Y),), {}, ["args[0]", "Custom"], id="a custom pytree node alone"),
    pytest.param(
        (X, jax.ShapeDtypeStruct((2, 3), "f4")), {}, ["args[1]", "ShapeDtypeStruct"], id="a spec"
    ),
    pytest.param((X, {("a",): Y}), {}, ["args[1]", "('a',)"], id="a tuple as key"),
    pytest.param((X, {True: Y}), {}, ["args[1]", "True"], id="a bool as key"),
]


@pytest.mark.parametrize("args, kwargs, parts", BAD_CALLS)
@pytest.mark.parametrize("given", [False, True], ids=["inferred", "with an output_spec"])
def test_arguments_that_do_not_fit_the_signature_are_named_in_the_error(args, kwargs, parts, given):
    spec = jax.ShapeDtypeStruct((2, 3), "f4") if given else None
    f = TorchModuleWrapper(torch.jit.script(subtract), output_spec=spec)
    text = error_of(lambda: f(*args, **kwargs))
    assert text.startswith("torchcall: subtract: ")
    assert "expected" in text
    for part in parts:
        assert part in text
    assert f.stats()["calls"] == 0
    assert_same(f(X, Y), X - Y)


BAD_DTYPES = [
    "int4",
    "uint4",
    "float8_e4m3",
    "float4_e2m1fn",
    "object",
    "<U1",
    "datetime64[D]",
    ">f4",
]


@pytest.mark.parametrize("dtype", BAD_DTYPES)
def test_dtype_that_torch_and_jax_do_not_share_is_an_error(dtype):
    f = TorchModuleWrapper(torch.jit.script(subtract))
    array = np.zeros((2, 3), jnp.dtype(dtype))
    text = error_of(lambda: f(X, array))
    assert text.startswith("torchcall: subtract: operand args[1]: expected ")
    assert "float32" in text
    assert text.endswith(f"got {array.dtype}")


def test_random_key_is_an_error():
    f = TorchModuleWrapper(torch.jit.script(subtract))
    text = error_of(lambda: jax.jit(f)(X, jax.random.key(0)))
    assert text.startswith(
        "torchcall: subtract: operand args[1]: expected numbers, got a random key, key<fry>"
    )


BAD_INPUT_SPECS = [
    pytest.param("float32", "str", id="a string"),
    pytest.param(((torch.float32,), None), "different lengths of tuple", id="too short"),
    pytest.param(((None, None), {"k": None}), "k", id="an unknown key"),
    pytest.param(torch.float4_e2m1fn_x2, "float4", id="a dtype that JAX lacks"),
    pytest.param(((np.float32, None), None), "type", id="a NumPy dtype"),
]


@pytest.mark.parametrize("input_spec, part", BAD_INPUT_SPECS)
def test_invalid_input_spec_is_an_error(input_spec, part):
    f = TorchModuleWrapper(torch.jit.script(subtract), input_spec=input_spec)
    text = error_of(lambda: f(X, Y))
    assert text.startswith("torchcall: subtract: input_spec")
    assert "expected" in text
    assert part in text


def test_input_spec_for_a_static_scalar_is_an_error():
    f = TorchModuleWrapper(torch.jit.script(times), input_spec=((None, torch.int64), None))
    text = error_of(lambda: f(X, 3))
    assert "input_spec" in text
    assert "args[1]" in text


def test_ordered_and_default_dicts_are_passed_as_dicts():
    f = TorchModuleWrapper(torch.jit.script(adds_values))
    ordered = OrderedDict(z=X, a=X + 1)
    default = defaultdict(list, z=X, a=X + 1)
    for d in (ordered, default, {"a": X + 1, "z": X}):
        assert_same(f(d), X + 2 * (X + 1))


def adds_values(d: dict[str, Tensor]) -> Tensor:
    return d["z"] + 2 * d["a"]


def two_dicts(x: Tensor) -> tuple[dict[str, Tensor], dict[int, Tensor]]:
    return {"a": x}, {1: x}


MIXED_KEYS = {"a": X, 1: X}


def test_dict_with_keys_of_two_types_is_an_error_that_names_it():
    f = TorchModuleWrapper(lambda d: d["a"])
    text = error_of(lambda: f({"d": MIXED_KEYS}))
    assert "operand args[0]['d']: expected a dict with keys of one type, got the keys" in text
    specs = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in MIXED_KEYS.items()}
    for output_spec in (None, specs, lambda _: specs):
        g = TorchModuleWrapper(lambda x: {"a": x, 1: x}, output_spec=output_spec)
        text = error_of(lambda g=g: jax.jit(g)(X))
        assert text.startswith("torchcall: <lambda>: output")
        assert "expected a dict with keys of one type, got the keys ['a', 1]" in text
    scripted = TorchModuleWrapper(torch.jit.script(two_dicts), output_spec=(specs, specs))
    text = error_of(lambda: scripted(X))
    assert "output_spec[0]: expected a dict with keys of one type, got the keys ['a', 1]" in text
