"""Results against eager torch: dtypes, shapes, layouts, casts, and kinds of TorchScript modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import Counter, Linear, assert_same, double, numpy_of, subtract, torch_of
from torch import Tensor, nn

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

DTYPES = {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
}
WIDE = {"int64", "float64", "complex128"}
# torch has these, with conversions and few operations.
FEW_OPERATIONS = {
    "uint16": torch.uint16,
    "uint32": torch.uint32,
    "uint64": torch.uint64,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}


def sample(dtype: str, shape: tuple[int, ...] = (3, 4)) -> np.ndarray:
    """Random bits for integers, values of either sign for the rest."""
    rng = np.random.default_rng(7)
    kind = jnp.dtype(dtype)
    if dtype == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max, shape, dtype=kind, endpoint=True)
    values = rng.standard_normal(shape)
    if kind.kind == "c":
        values = values + 1j * rng.standard_normal(shape)
    if dtype == "float8_e8m0fnu":  # powers of 2 only
        values = np.abs(values)
    return values.astype(kind)


def combine(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x + y, torch.cat([x, y]), x[1:].t()


def passes(x: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("x64")
def test_every_shared_dtype_gives_what_eager_torch_gives(dtype):
    x, y = sample(dtype), sample(dtype)[::-1].copy()
    f = TorchModuleWrapper(torch.jit.script(combine))
    expected = combine(torch_of(x), torch_of(y))
    assert expected[0].dtype == DTYPES[dtype]
    assert_same(f(x, y), expected)
    assert_same(jax.jit(f)(jnp.asarray(x), jnp.asarray(y)), expected)


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name not in WIDE])
def test_every_narrow_dtype_works_with_x64_off(dtype):
    x, y = sample(dtype), sample(dtype)[::-1].copy()
    f = TorchModuleWrapper(torch.jit.script(combine))
    assert_same(jax.jit(f)(x, y), combine(torch_of(x), torch_of(y)))


def passes_all(xs: list[Tensor]) -> list[Tensor]:
    return xs


@pytest.mark.parametrize("dtype", [*DTYPES, *FEW_OPERATIONS])
@pytest.mark.usefixtures("x64")
def test_every_dtype_passes_through_in_every_kind_of_shape(dtype):
    xs = [sample(dtype, shape) for shape in [(), (1,), (0,), (2, 0, 3), (1, 1, 1, 1, 1, 2)]]
    f = TorchModuleWrapper(torch.jit.script(passes_all))
    assert_same(f(xs), xs)
    assert_same(jax.jit(f)(xs), xs)


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.usefixtures("x64")
def test_input_cast_to_every_dtype_equals_eager_torch(source):
    x = sample(source)
    if jnp.dtype(source).kind in "fc" or source == "bfloat16":
        x = np.abs(x)  # casting a negative float to uint8 is undefined in torch too
    targets = [d for d in DTYPES.values() if d.is_complex or not source.startswith("complex")]
    f = TorchModuleWrapper(torch.jit.script(passes_all), input_spec=(([*targets],), None))
    assert_same(f([x] * len(targets)), [torch_of(x).to(target) for target in targets])


def to_float(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.to(torch.float64), x.flatten()


@pytest.mark.parametrize("engine", ["TorchScript", "eager"])
@pytest.mark.parametrize("dtype", FEW_OPERATIONS)
@pytest.mark.usefixtures("x64")
def test_wide_unsigned_integers_and_float8_are_read_and_returned_as_they_are(dtype, engine):
    x = sample(dtype)
    f = TorchModuleWrapper(torch.jit.script(to_float) if engine == "TorchScript" else to_float)
    expected = (x.astype(np.float64), x.reshape(-1))
    assert_same(f(x), expected)
    assert_same(jax.jit(f)(jnp.asarray(x)), expected)


@pytest.mark.parametrize("dtype", FEW_OPERATIONS)
@pytest.mark.usefixtures("x64")
def test_an_input_is_cast_to_wide_unsigned_integers_and_float8(dtype):
    x = np.array([1.0, 2.0, 4.0])
    f = TorchModuleWrapper(torch.jit.script(passes), input_spec=((FEW_OPERATIONS[dtype],), None))
    assert_same(f(x), x.astype(jnp.dtype(dtype)))


def gathers(x: Tensor, index: Tensor) -> Tensor:
    assert index.dtype == torch.int64
    return x[index]


def test_int64_indices_reach_torch_with_x64_off():
    x, index = sample("float32"), np.array([2, 0, 1, 1], np.int32)
    f = TorchModuleWrapper(torch.jit.script(gathers), input_spec=((None, torch.int64), None))
    assert_same(jax.jit(f)(x, index), x[index])


def multiplies(d: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return d["a"] * 1, d["b"] * 1, x * 1, y * 1


def test_input_spec_is_a_pytree_prefix_of_args_and_kwargs():
    module = torch.jit.script(multiplies)
    a = np.arange(3, dtype=np.int32)
    spec = (({"a": torch.float16, "b": None}, torch.float32), {"y": torch.bfloat16})
    got = TorchModuleWrapper(module, input_spec=spec)({"a": a, "b": a}, a, y=a)
    assert [str(g.dtype) for g in got] == ["float16", "int32", "float32", "bfloat16"]
    got = TorchModuleWrapper(module, input_spec=((torch.int16, None), None))(
        {"a": a, "b": a}, a, y=a
    )
    assert [str(g.dtype) for g in got] == ["int16", "int16", "int32", "int32"]


def expands(x: Tensor) -> Tensor:
    return x[:1].expand(5, 4)


def strides_backwards(x: Tensor) -> Tensor:
    return x.flip(0)[:, ::2]


def permutes(x: Tensor) -> Tensor:
    return x.reshape(2, 3, 2).permute(2, 0, 1)


def starts_inside_storage(x: Tensor) -> Tensor:
    return x.view(-1)[5:]


def channels_last(x: Tensor) -> Tensor:
    return x.reshape(1, 2, 3, 2).contiguous(memory_format=torch.channels_last)


def same_tensor_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x * 2
    return y, y


@pytest.mark.parametrize(
    "function",
    [expands, strides_backwards, permutes, starts_inside_storage, channels_last, same_tensor_twice],
    ids=lambda f: f.__name__.replace("_", " "),
)
def test_output_of_any_layout_equals_eager_torch(function):
    x = sample("float32")
    f = TorchModuleWrapper(torch.jit.script(function))
    assert_same(jax.jit(f)(x), function(torch_of(x)))


def conjugates(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.conj(), x.conj().imag, x.mT.conj()


def test_conjugate_and_negative_views_are_resolved():
    x = sample("complex64")
    eager = conjugates(torch_of(x))
    assert eager[0].is_conj()
    assert eager[1].is_neg()
    f = TorchModuleWrapper(torch.jit.script(conjugates))
    assert_same(jax.jit(f)(x), (x.conj(), x.conj().imag, x.T.conj()))


def unaligned(x: np.ndarray) -> np.ndarray:
    data = np.frombuffer(b"x" + x.tobytes(), np.uint8)[1:]
    return data.view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(np.asfortranarray, id="column-major"),
        pytest.param(lambda x: np.repeat(x, 2, axis=1)[:, ::2], id="strided"),
        pytest.param(lambda x: x[::-1, ::-1], id="with negative strides"),
        pytest.param(lambda x: np.broadcast_to(x[0], x.shape), id="broadcast"),
        pytest.param(unaligned, id="unaligned"),
    ],
)
def test_numpy_operand_of_any_layout_is_read_correctly(layout):
    x = layout(sample("float32"))
    f = TorchModuleWrapper(torch.jit.script(double))
    assert_same(f(x), 2 * x)
    assert_same(jax.jit(f)(x), 2 * x)


def test_operand_that_xla_transposes_reaches_torch_in_row_major_order():
    x = jnp.asarray(sample("float32"))
    f = TorchModuleWrapper(torch.jit.script(strides_backwards))
    program = jax.jit(lambda x: f(x.T) + f(jnp.swapaxes(x, 0, 1) * 1))
    assert_same(program(x), 2 * strides_backwards(torch_of(x).t()))


def total(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(), x.sum(0)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_zero_size_operand_gives_what_eager_torch_gives(shape):
    x = np.zeros(shape, np.float32)
    assert_same(jax.jit(TorchModuleWrapper(torch.jit.script(total)))(x), total(torch_of(x)))


def selects(x: Tensor) -> Tensor:
    return x[2:1] * 2


def test_zero_size_output_is_empty():
    x = sample("float32")
    assert_same(jax.jit(TorchModuleWrapper(torch.jit.script(selects)))(x), x[2:1])


@pytest.mark.parametrize("scalar", [np.float32(2.5), np.bool_(True), np.int32(-3)], ids=repr)
def test_numpy_scalar_is_a_zero_dimensional_operand(scalar):
    assert_same(TorchModuleWrapper(torch.jit.script(passes))(scalar), np.asarray(scalar))


def test_special_values_pass_through_bit_for_bit():
    bits = np.array([0x7FC00000, 0xFFC00001, 0x7F800000, 0x80000000, 1, 0x807FFFFF], np.uint32)
    got = jax.jit(TorchModuleWrapper(torch.jit.script(passes)))(bits.view(np.float32))
    np.testing.assert_array_equal(np.asarray(got).view(np.uint32), bits)


@pytest.mark.usefixtures("x64")
def test_float64_values_are_not_rounded():
    x = np.array([1 + 2**-52, 1e300, np.pi])
    assert_same(jax.jit(TorchModuleWrapper(torch.jit.script(double)))(x), 2 * x)


def test_one_wrapper_works_with_x64_on_and_off():
    f = TorchModuleWrapper(torch.jit.script(double))
    x = np.array([1.0, 2.0])
    assert f(x).dtype == jnp.float32
    with jax.enable_x64(True):
        assert f(x).dtype == jnp.float64
    assert f(x).dtype == jnp.float32


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype:UserWarning")
def test_float64_array_passed_with_x64_off_is_treated_as_jax_treats_it():
    with jax.enable_x64(True):
        x = jnp.arange(3.0, dtype=jnp.float64)
    expected = jax.jit(lambda x: x * 2)(x)
    f = TorchModuleWrapper(torch.jit.script(double))
    assert_same(f(x), np.asarray(expected))
    assert_same(jax.jit(f)(x), np.asarray(expected))


def test_traced_module_works_for_other_shapes():
    module = Linear()
    traced = torch.jit.trace(module, torch.zeros(2, 3))
    f = TorchModuleWrapper(traced)
    for rows in (1, 2, 7):
        x = sample("float32", (rows, 3))
        assert_same(jax.jit(f)(x), module(torch_of(x)))


def test_traced_function_works():
    traced = torch.jit.trace(subtract, (torch.zeros(2), torch.zeros(2)))
    x = sample("float32", (5,))
    assert_same(TorchModuleWrapper(traced)(x, x + 1), x - (x + 1))


@pytest.mark.parametrize("freeze", [False, True], ids=["not frozen", "frozen by the wrapper"])
def test_scripted_and_frozen_modules_equal_eager_torch(freeze):
    module = Linear()
    x = sample("float32", (6, 3))
    f = TorchModuleWrapper(torch.jit.script(module), freeze=freeze)
    np.testing.assert_allclose(f(x), numpy_of(module(torch_of(x))), rtol=1e-6, atol=1e-6)


def test_module_frozen_by_torch_itself_works():
    module = Linear()
    frozen = torch.jit.freeze(torch.jit.script(module))
    x = sample("float32", (6, 3))
    np.testing.assert_allclose(
        TorchModuleWrapper(frozen)(x), numpy_of(module(torch_of(x))), rtol=1e-6, atol=1e-6
    )


def test_state_advances_as_in_eager_torch():
    eager, scripted = Counter(), torch.jit.script(Counter())
    f = TorchModuleWrapper(scripted)
    for _ in range(3):
        assert_same(f(np.float32(1)), eager(torch.tensor(1.0)))
    assert scripted.count.item() == 3


def draws(x: Tensor) -> Tensor:
    return x + torch.rand(3, 4)


def test_random_numbers_come_from_torchs_generator():
    f = TorchModuleWrapper(torch.jit.script(draws))
    x = sample("float32")
    f(x)  # makes the plan
    torch.manual_seed(5)
    got = f(x)
    torch.manual_seed(5)
    assert_same(got, draws(torch_of(x)))


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.SiLU(), nn.MaxPool2d(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).flatten(1).softmax(1)


def test_network_of_many_layers_equals_eager_torch():
    module = Convolution().eval()
    x = sample("float32", (2, 2, 8, 8))
    f = TorchModuleWrapper(torch.jit.script(module))
    np.testing.assert_allclose(jax.jit(f)(x), numpy_of(module(torch_of(x))), rtol=1e-5, atol=1e-6)
