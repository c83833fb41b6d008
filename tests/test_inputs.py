"""Operands are read-only: a module that writes to an input or retains it gets a private copy."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import aligned, assert_same, error_of, like_input, torch_of
from torch import Tensor, nn

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3) - 2


def adds(x: Tensor) -> Tensor:
    return x.add_(1)


def adds_through_view(x: Tensor) -> Tensor:
    x.view(-1)[1:3].add_(1)
    return x * 1


def adds_through_transpose(x: Tensor) -> Tensor:
    x.t().add_(1)
    return x * 1


def adds_through_reshape(x: Tensor) -> Tensor:
    y = x.reshape(-1)
    y[0] = 7
    return y


def adds_through_detach(x: Tensor) -> Tensor:
    x.detach().add_(1)
    return x * 1


def adds_through_data(x: Tensor) -> Tensor:
    x.data.add_(1)
    return x * 1


def adds_to_unbound_rows(x: Tensor) -> Tensor:
    for row in x:
        row.add_(1)
    return x * 1


def adds_to_chunk(x: Tensor) -> Tensor:
    x.chunk(2)[0].add_(1)
    return x * 1


def adds_to_unsafe_chunk(x: Tensor) -> Tensor:
    parts = torch.unsafe_chunk(x, 2)
    parts[0].add_(1)
    return x * 1


def adds_to_diagonal(x: Tensor) -> Tensor:
    x.diagonal().add_(1)
    return x * 1


def adds_after_a_cast_to_the_same_dtype(x: Tensor) -> Tensor:
    y = x.to(torch.float32)
    y.add_(1)
    return y


def adds_after_contiguous(x: Tensor) -> Tensor:
    y = x.contiguous()
    y.add_(1)
    return y


def assigns_an_element(x: Tensor) -> Tensor:
    x[1, 2] = 9.0
    return x * 1


def assigns_by_mask(x: Tensor) -> Tensor:
    x[x < 0] = 0.0
    return x * 1


def puts_by_index(x: Tensor) -> Tensor:
    x.index_put_([torch.arange(2)], torch.ones(2, 3), accumulate=True)
    return x * 1


def copies_into(x: Tensor) -> Tensor:
    x.copy_(torch.ones(3))
    return x * 1


def writes_to_out_argument(x: Tensor) -> Tensor:
    return torch.add(x, x, out=x)


def relu_in_place(x: Tensor) -> Tensor:
    return torch.nn.functional.relu(x, inplace=True)


def resizes(x: Tensor) -> Tensor:
    x.resize_(4)
    return x * 1


def transposes_in_place(x: Tensor) -> Tensor:
    x.t_()
    x[0, 1] = 5.0
    return x * 1


def sets_storage(x: Tensor) -> Tensor:
    y = torch.zeros(1)
    y.set_(x)
    y.add_(1)
    return y


def writes_in_a_branch(x: Tensor) -> Tensor:
    y = x * 2
    if x.size(0) == 2:
        y = x
    y.add_(1)
    return y


def writes_in_a_loop(x: Tensor) -> Tensor:
    y = x
    for i in range(3):
        y.add_(i)
    return y


def adds_after_dropout_in_eval_mode(x: Tensor) -> Tensor:
    y = torch.nn.functional.dropout(x, 0.5, False)
    y += 1
    return y


def adds_after_feature_dropout_in_eval_mode(x: Tensor) -> Tensor:
    y = torch.feature_dropout(x, 0.5, False)
    y += 1
    return y


def adds_after_alpha_dropout_in_eval_mode(x: Tensor) -> Tensor:
    y = torch.nn.functional.alpha_dropout(x, 0.5, False)
    y += 1
    return y


def adds_after_einsum_that_permutes(x: Tensor) -> Tensor:
    y = torch.einsum("ij->ji", x)
    y += 1
    return y


def adds_after_type_as(x: Tensor) -> Tensor:
    y = x.type_as(x)
    y += 1
    return y


def adds_after_atleast_1d(x: Tensor) -> Tensor:
    y = torch.atleast_1d(x)
    y += 1
    return y


def adds_after_atleast_3d(x: Tensor) -> Tensor:
    y = torch.atleast_3d(x)
    y += 1
    return y


def adds_after_sum_to_the_same_size(x: Tensor) -> Tensor:
    y = x.sum_to_size([2, 3])
    y += 1
    return y


def adds_after_to_dense(x: Tensor) -> Tensor:
    y = x.to_dense()
    y += 1
    return y


def adds_after_broadcast_tensors(x: Tensor) -> Tensor:
    y = torch.broadcast_tensors(x, torch.zeros(3))[0]
    y += 1
    return y


def adds_after_meshgrid(x: Tensor) -> Tensor:
    y = torch.meshgrid(x.view(-1), indexing="ij")[0]
    y += 1
    return y


WRITERS = [value for name, value in list(globals().items()) if name.islower() and callable(value)]
WRITERS = [f for f in WRITERS if getattr(f, "__module__", "") == __name__]


def sentence(function):
    return function.__name__.replace("_", " ")


@pytest.mark.parametrize("function", WRITERS, ids=sentence)
def test_module_that_writes_to_its_input_computes_on_a_copy(function):
    expected = function(torch_of(X))
    f = TorchModuleWrapper(torch.jit.script(function))
    jitted = jax.jit(f)
    device_array, host_array = jnp.asarray(X), aligned(X)
    for x in (device_array, host_array):
        for call in (f, jitted):
            for _ in range(2):
                assert_same(call(x), expected)
                np.testing.assert_array_equal(np.asarray(x), X)


@pytest.mark.parametrize("function", WRITERS, ids=sentence)
def test_module_that_writes_to_its_input_does_not_change_a_constant(function):
    expected = function(torch_of(X))
    f = TorchModuleWrapper(torch.jit.script(function))
    constant = jnp.asarray(X)
    program = jax.jit(lambda: (f(constant), constant + 0))
    for _ in range(2):
        got, after = program()
        assert_same(got, expected)
        np.testing.assert_array_equal(after, X)


class WritesInSubmodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(inplace=True), nn.Hardtanh(0.0, 2.0, inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class IgnoredPython(nn.Module):
    @torch.jit.ignore
    def in_python(self, x: Tensor) -> Tensor:
        x.add_(5)
        return x * 3

    def forward(self, x: Tensor) -> Tensor:
        return self.in_python(x)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(WritesInSubmodule(), id="in a submodule"),
        pytest.param(nn.Sequential(nn.Dropout(), nn.ReLU(inplace=True)).eval(), id="after dropout"),
        pytest.param(IgnoredPython(), id="in a method that TorchScript ignores"),
    ],
)
def test_module_that_writes_through_a_submodule_computes_on_a_copy(module):
    expected = module(torch_of(X))
    x = aligned(X)
    f = TorchModuleWrapper(torch.jit.script(module), output_spec=like_input)
    assert_same(jax.jit(f)(x), expected)
    np.testing.assert_array_equal(x, X)


def writes_to_batch_statistics(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    y = torch.nn.functional.batch_norm(x, mean, var, training=True)
    return y + mean


def test_operator_that_updates_an_input_without_declaring_it_gets_a_copy():
    mean, var = X[0], np.ones(3, np.float32)
    expected = writes_to_batch_statistics(torch_of(X), torch_of(mean), torch_of(var))
    operands = aligned(X), aligned(mean), aligned(var)
    f = jax.jit(TorchModuleWrapper(torch.jit.script(writes_to_batch_statistics)))
    for _ in range(2):
        assert_same(f(*operands), expected)
    for operand, original in zip(operands, (X, mean, var), strict=True):
        np.testing.assert_array_equal(operand, original)


def writes_only_to_the_second(x: Tensor, y: Tensor) -> Tensor:
    y.add_(x)
    return y


def test_one_array_passed_twice_is_not_changed_by_a_write_to_one_argument():
    f = TorchModuleWrapper(torch.jit.script(writes_only_to_the_second))
    x = jnp.asarray(X)
    assert_same(f(x, x), 2 * X)
    np.testing.assert_array_equal(x, X)


def differentiates(x: Tensor) -> Tensor:
    x.requires_grad_(True)
    gradient = torch.autograd.grad([(x**3).sum()], [x])[0]
    assert gradient is not None
    return gradient


def test_setting_requires_grad_on_an_input_is_not_a_write():
    f = TorchModuleWrapper(torch.jit.script(differentiates), requires_grad=True)
    for _ in range(2):
        assert_same(f(X), differentiates(torch_of(X)))
    assert f.stats()["copied_inputs"] == 0
    assert f.stats()["retained_inputs"] == 0


def test_write_to_a_cast_input_leaves_the_operand_unchanged():
    f = TorchModuleWrapper(torch.jit.script(adds), input_spec=torch.float16)
    x = aligned(X)
    assert_same(f(x), adds(torch_of(X).half()))
    np.testing.assert_array_equal(x, X)


def test_memory_that_the_caller_frees_is_never_read_after_the_call():
    """Allocates and frees arrays at the same addresses while it checks results."""
    f = TorchModuleWrapper(torch.jit.script(adds))
    for i in range(50):
        x = np.full((64, 64), i, np.float32)
        assert_same(f(x), x + 1)
        del x
        gc.collect() if i % 10 == 0 else None


def reads_a_value(x: Tensor) -> Tensor:
    if bool(x.sum() > 0):
        return x.add_(1)
    return x.sub_(1)


def test_write_in_a_data_dependent_branch_leaves_the_input_unchanged():
    f = TorchModuleWrapper(torch.jit.script(reads_a_value), output_spec=like_input)
    for values in (X + 10, X - 10):
        x = aligned(values)
        assert_same(f(x), reads_a_value(torch_of(values)))
        np.testing.assert_array_equal(x, values)


def test_error_inside_a_module_that_writes_leaves_the_input_unchanged():
    f = TorchModuleWrapper(torch.jit.script(writes_then_raises), output_spec=like_input)
    x = aligned(X)
    assert "enough" in error_of(lambda: f(x))
    np.testing.assert_array_equal(x, X)


def writes_then_raises(x: Tensor) -> Tensor:
    x.zero_()
    if x.size(0) == 2:
        raise ValueError("enough")
    return x
