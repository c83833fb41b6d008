"""Kinds of TorchScript code whose results could silently differ from torch's."""

import jax
import numpy as np
import pytest
import torch
from models import assert_same, error_of, like_input, numpy_of, torch_of
from torch import Tensor, nn

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)


class Doubles(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class CallsInner(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def adds_before(self, inputs: tuple[Tensor]) -> tuple[Tensor]:  # noqa: ARG001
    return (inputs[0] + 100,)


def adds_after(self, inputs: tuple[Tensor], output: Tensor) -> Tensor:  # noqa: ARG001
    return output + 1000


def hooked(*, before: bool, after: bool) -> nn.Module:
    module = Doubles()
    if before:
        module.register_forward_pre_hook(adds_before)
    if after:
        module.register_forward_hook(adds_after)
    return module


@pytest.mark.parametrize(
    "before, after",
    [(True, False), (False, True), (True, True)],
    ids=["pre-hook", "hook", "both hooks"],
)
@pytest.mark.parametrize("freeze", [False, True], ids=["", "frozen"])
def test_forward_hooks_of_a_submodule_run(before, after, freeze):
    module = CallsInner(hooked(before=before, after=after)).eval()
    expected = module(torch_of(X))
    f = TorchModuleWrapper(torch.jit.script(module), freeze=freeze)
    assert_same(f(X), expected)
    assert_same(jax.jit(f)(X), expected)


@pytest.mark.parametrize("before, after", [(True, False), (False, True)], ids=["before", "after"])
def test_forward_hooks_of_the_model_are_an_error_that_says_what_to_do(before, after):
    scripted = torch.jit.script(hooked(before=before, after=after))
    text = error_of(lambda: TorchModuleWrapper(scripted))
    assert "Doubles" in text
    assert "expected a module without forward hooks" in text
    assert "submodule" in text


class Autocasts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        return y.float()


def test_autocast_inside_the_model_takes_effect():
    module = torch.jit.script(Autocasts())
    expected = module(torch_of(X + 0.1))
    assert not torch.equal(expected, module.linear(torch_of(X + 0.1)))
    assert_same(TorchModuleWrapper(module)(X + np.float32(0.1)), expected)


class NoGrad(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x.requires_grad_(True)
        with torch.no_grad():
            scale = x.sum()
        energy = (x * x).sum() * scale
        gradient = torch.autograd.grad([energy], [x])[0]
        assert gradient is not None
        return energy, gradient


def test_no_grad_inside_a_differentiating_model_takes_effect():
    f = TorchModuleWrapper(torch.jit.script(NoGrad()), requires_grad=True)
    assert_same(f(X), NoGrad()(torch_of(X)))


class SecondDerivative(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_(True)
        first = torch.autograd.grad([(x**3).sum()], [x], create_graph=True)[0]
        assert first is not None
        second = torch.autograd.grad([first.sum()], [x])[0]
        assert second is not None
        return second


def test_model_may_compute_second_derivatives():
    f = TorchModuleWrapper(torch.jit.script(SecondDerivative()), requires_grad=True)
    for _ in range(2):
        assert_same(jax.jit(f)(X), SecondDerivative()(torch_of(X)))


class CallsBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        leaf = x.detach().requires_grad_(True)
        (leaf * leaf * self.weight).sum().backward()
        gradient = leaf.grad
        assert gradient is not None
        return gradient


def test_backward_inside_the_model_does_not_change_the_gradients_of_its_weights():
    module = torch.jit.script(CallsBackward())
    f = TorchModuleWrapper(module, requires_grad=True, output_spec=like_input)
    for _ in range(2):
        assert_same(f(X), 4 * X)
    assert module.weight.grad is None


def adds_one(x: Tensor) -> Tensor:
    return x + 1


def forks(x: Tensor) -> Tensor:
    futures = [torch.jit.fork(adds_one, x * i) for i in range(4)]
    total = torch.zeros_like(x)
    for future in futures:
        total += torch.jit.wait(future)
    return total


def test_call_waits_for_forked_tasks():
    f = TorchModuleWrapper(torch.jit.script(forks), output_spec=like_input)
    for _ in range(5):
        assert_same(jax.jit(f)(X), 6 * X + 4)


def test_forks_without_an_output_spec_are_an_error():
    text = error_of(lambda: TorchModuleWrapper(torch.jit.script(forks))(X))
    assert "torchcall: forks: fake tensors cannot trace torch.jit.fork" in text
    assert "output_spec=" in text


class HasIgnoredMethod(nn.Module):
    @torch.jit.ignore
    def in_python(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(x) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.in_python(x) + 1


def test_method_that_torchscript_ignores_runs_in_python():
    f = TorchModuleWrapper(torch.jit.script(HasIgnoredMethod()), output_spec=like_input)
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: f(x), x))
    assert_same(f(X), 3 * X + 1)
    assert_same(loop(X), 27 * X + 13)


def prints(x: Tensor) -> Tensor:
    print("the model says", x.size(0))
    return x + 1


def test_model_may_print(capfd):
    f = TorchModuleWrapper(torch.jit.script(prints), output_spec=like_input)
    assert_same(jax.jit(f)(X), X + 1)
    assert "the model says 2" in capfd.readouterr().out


class ResetsState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.total = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        self.total = torch.zeros(3)
        return x + 1


def test_constant_that_a_model_assigns_to_its_state_is_created_in_every_call():
    module = torch.jit.script(ResetsState())
    f = TorchModuleWrapper(module)
    jax.block_until_ready(f(X))
    module.total.add_(7)  # the caller may change it
    jax.block_until_ready(f(X))
    assert torch.equal(module.total, torch.zeros(3))


class Accumulates(nn.Module):
    calls: int

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.total = torch.zeros(3)

    def forward(self, x: Tensor) -> Tensor:
        if self.calls % 3 == 0:
            self.total = torch.zeros(3)
        self.calls += 1
        self.total.add_(x[1])
        return self.total


def test_state_that_is_reset_every_third_call_equals_eager_torch():
    eager, f = Accumulates(), TorchModuleWrapper(torch.jit.script(Accumulates()))
    for _ in range(7):
        assert_same(f(X), eager(torch_of(X)))


def fills_a_constant(x: Tensor) -> Tensor:
    total = torch.nn.functional.dropout(torch.zeros(2, 3), 0.5, False)
    total += x
    return total


def test_writes_to_an_alias_of_a_constant_do_not_accumulate():
    f = TorchModuleWrapper(torch.jit.script(fills_a_constant))
    for _ in range(3):
        assert_same(f(X), X)


class Loops(nn.Module):
    def forward(self, x: Tensor, n: int) -> Tensor:
        i = 0
        while bool(x.sum() < 100) and i < n:
            x = x * 2 + 1
            i += 1
        return x


def test_data_dependent_loop_equals_eager_torch():
    f = TorchModuleWrapper(torch.jit.script(Loops()), output_spec=like_input)
    for n in (0, 2, 50):
        assert_same(f(X, n), Loops()(torch_of(X), n))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0]).squeeze(-1)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(Recurrent(), id="an LSTM"),
        pytest.param(nn.Conv1d(4, 2, 3), id="a convolution"),
        pytest.param(nn.Sequential(nn.LayerNorm(3), nn.GELU(), nn.Dropout()), id="a normalisation"),
        pytest.param(
            nn.TransformerEncoderLayer(3, 1, 8, batch_first=True), id="a transformer layer"
        ),
        pytest.param(nn.BatchNorm1d(4), id="batch statistics"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"freeze": True}, {"requires_grad": True}], ids=str)
def test_common_layers_equal_eager_torch(module, options):
    module = module.eval()
    x = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    f = TorchModuleWrapper(torch.jit.script(module), **options)
    np.testing.assert_allclose(f(x), numpy_of(module(torch_of(x))), rtol=1e-5, atol=1e-6)


def test_module_optimised_for_inference_works():
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32)
    optimised = torch.jit.optimize_for_inference(torch.jit.script(module))
    f = TorchModuleWrapper(optimised, output_spec=jax.ShapeDtypeStruct((1, 4, 6, 6), np.float32))
    np.testing.assert_allclose(f(x), numpy_of(module(torch_of(x))), rtol=1e-4, atol=1e-5)
