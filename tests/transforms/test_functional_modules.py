"""Which modules `functional` takes, what it makes of their parameters and state, and its errors."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import error_of
from torch import Tensor, nn
from twins import ENGINES, assert_close, random

import torchcall


def functional(module, engine, **options):
    if engine == "TorchScript":
        module = torch.jit.script(module)
    return torchcall.functional(module, **options)


def equals(module, apply, parameters, *given):
    """Whether a call returns what the module does."""
    tensors = [torch.tensor(np.array(x)) for x in given]
    with torch.no_grad():
        expected = module(*tensors)
    np.testing.assert_allclose(apply(parameters, *given), expected.numpy(), rtol=1e-6, atol=1e-7)


class Tied(nn.Module):
    """One linear map under two names, and one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.again = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.b(self.a(x)))


def tied_in_jax(p, x):
    w, b = p["a.weight"], p["a.bias"]
    return ((x @ w.T + b) @ w.T) @ w.T + b


@pytest.mark.parametrize("engine", [*ENGINES, "archive"])
def test_tied_parameters_are_one(engine, tmp_path):
    module = Tied()
    if engine == "archive":
        torch.jit.script(module).save(tmp_path / "tied.pt")
        parameters, apply = torchcall.functional(tmp_path / "tied.pt")
    else:
        parameters, apply = functional(module, engine)
    assert sorted(parameters) == ["a.bias", "a.weight"]
    x = jnp.ones((2, 3))
    got = jax.grad(lambda p: apply(p, x).sum())(parameters)
    expected = jax.grad(lambda p: tied_in_jax(p, x).sum())(parameters)
    for key in parameters:
        np.testing.assert_allclose(got[key], expected[key], rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_callers_module_does_not_change(engine):
    module = Tied() if engine == "eager" else torch.jit.script(Tied())
    before = copy.deepcopy(module.state_dict())
    versions = [weight._version for weight in module.parameters()]
    parameters, apply = torchcall.functional(module)
    jax.grad(lambda p: apply(p, jnp.ones((2, 3))).sum())(jax.tree.map(jnp.zeros_like, parameters))
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(weight.grad is None for weight in module.parameters())
    assert [weight._version for weight in module.parameters()] == versions
    with torch.no_grad():
        module.a.weight.zero_()
    assert apply(parameters, jnp.ones((2, 3))).any()
    assert parameters["a.weight"].any()


class Parts(nn.Module):
    """Parameters in a ParameterList, a frozen one, integers, and a buffer that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([nn.Parameter(torch.randn(3)) for _ in range(2)])
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.rows = nn.Parameter(torch.tensor([2, 0, 1]), requires_grad=False)
        self.register_buffer("shift", torch.randn(3))
        self.name = "parts"

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.listed:
            x = x * weight
        return (x * self.frozen)[self.rows] + self.shift


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_are_included_integers_and_buffers_are_not(engine):
    module = Parts()
    parameters, apply = functional(module, engine)
    assert sorted(parameters) == ["frozen", "listed.0", "listed.1"]
    x = jnp.arange(1.0, 4.0)
    equals(module, apply, parameters, x)
    gradient = jax.grad(lambda p: apply(p, x).sum())(parameters)["frozen"]
    np.testing.assert_allclose(gradient, x * parameters["listed.0"] * parameters["listed.1"], 1e-6)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_parameters_of_eight_bits(dtype):
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([0.5, -2.0, 3.0]).to(dtype))
    parameters, _ = torchcall.functional(module)
    np.testing.assert_array_equal(np.asarray(parameters["weight"], np.float32), [0.5, -2.0, 3.0])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_parameters(engine, dtype):
    module = nn.Linear(3, 2).to(dtype)
    parameters, apply = functional(module, engine)
    x = jnp.ones(3, parameters["weight"].dtype)
    for key, value in module.named_parameters():
        np.testing.assert_array_equal(
            np.asarray(parameters[key], np.float32), value.detach().float().numpy()
        )
    with jax.numpy_dtype_promotion("standard"):
        gradient = jax.grad(lambda p: apply(p, x).sum())(parameters)
    assert_close(gradient, {"weight": jnp.ones((2, 3), x.dtype), "bias": jnp.ones(2, x.dtype)})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_without_parameters(engine):
    parameters, apply = functional(nn.Sequential(nn.Tanh()), engine)
    assert parameters == {}
    x = jnp.arange(3.0)
    np.testing.assert_allclose(jax.jit(apply)({}, x), jnp.tanh(x), rtol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: apply({}, x).sum())(x), 1 - jnp.tanh(x) ** 2, 1e-5
    )


def test_a_frozen_module_has_no_parameters():
    module = nn.Linear(3, 2).eval()
    parameters, apply = torchcall.functional(torch.jit.freeze(torch.jit.script(module)))
    assert parameters == {}
    equals(module, apply, parameters, random(4, 3).astype(jnp.float32))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_norm_in_eval_mode_works_and_in_training_mode_is_refused(engine):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    module(torch.randn(20, 3))
    error = error_of(lambda: functional(module, engine))
    assert "1: expected a module that does not change its buffers" in error
    module.eval()
    parameters, apply = functional(module, engine)
    assert sorted(parameters) == ["0.bias", "0.weight", "1.bias", "1.weight"]
    x = random(5, 3).astype(jnp.float32)
    equals(module, apply, parameters, x)
    jax.grad(lambda p: apply(p, x).sum())(parameters)
    batchwise = nn.BatchNorm1d(3, track_running_stats=False)
    equals(batchwise, functional(batchwise, engine)[1], functional(batchwise, engine)[0], x)


class Counter(nn.Module):
    """Changes its state in the way `kind`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("running_var", torch.ones(3))
        self.calls = 0
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "in place":
            self.count.add_(1)
        elif self.kind == "assigned":
            self.count = self.count + 1
        elif self.kind == "statistics":
            x = nn.functional.batch_norm(x, self.mean, self.running_var, training=True)
        else:
            self.calls += 1
        return x * self.weight + self.calls


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["in place", "assigned", "statistics"])
@pytest.mark.parametrize("differentiated", [False, True])
def test_a_changed_buffer_is_an_error(engine, kind, differentiated):
    module = Counter(kind)
    parameters, apply = functional(module, engine)
    x = random(4, 3).astype(jnp.float32)
    f = (
        (lambda p: jax.grad(lambda p: apply(p, x).sum())(p))
        if differentiated
        else (lambda p: apply(p, x))
    )
    for _ in range(2):
        error = error_of(lambda: jax.block_until_ready(f(parameters)))
        name = (
            "running_var"
            if kind == "statistics" and engine == "eager"
            else ("mean" if kind == "statistics" else "count")
        )
        assert f"buffer '{name}': expected a module that does not change its buffers" in error
    assert not module.count.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_assigned_attributes_have_their_old_values_in_the_next_call(engine):
    parameters, apply = functional(Counter("calls"), engine)
    x = jnp.zeros(3)
    for _ in range(2):
        np.testing.assert_array_equal(apply(parameters, x), 1.0)
        jax.grad(lambda p: apply(p, x).sum())(parameters)


class Halving(nn.Module):
    """Writes to its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.weight.detach().mul_(0.5)
        return x * self.weight


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_that_writes_to_a_parameter_gets_a_copy(engine):
    parameters, apply = functional(Halving(), engine)
    x = jnp.arange(3.0)
    for _ in range(2):
        np.testing.assert_array_equal(apply(parameters, x), 0.5 * x)
        gradient = jax.grad(lambda p: apply(p, x).sum())(parameters)["weight"]
        np.testing.assert_array_equal(gradient, x)
        np.testing.assert_array_equal(parameters["weight"], 1.0)


EAGER = {
    "LSTM": lambda: nn.LSTM(3, 4),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    "computed attribute": lambda: with_attribute(nn.Linear(3, 4)),
}


def with_attribute(module):
    module.computed = module.weight * 2
    return module


@pytest.mark.parametrize("name", EAGER)
def test_eager_modules_with_state_of_their_own(name):
    module = EAGER[name]()
    parameters, apply = torchcall.functional(module)
    p = jax.tree.map(lambda a: 0.5 * a, parameters)
    x = np.ones((5, 3), np.float32)

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    twin = copy.deepcopy(module) if name != "computed attribute" else nn.Linear(3, 4)
    twin.load_state_dict({k: torch.tensor(np.array(v)) for k, v in p.items()}, strict=False)
    expected = first(twin(torch.tensor(x)))
    for _ in range(2):
        np.testing.assert_allclose(first(apply(p, x)), expected.detach(), rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda p: first(apply(p, x)).sum())(p)
    expected.sum().backward()
    for key, weight in twin.named_parameters():
        np.testing.assert_allclose(gradient[key], weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_input_spec_is_that_of_a_call_of_apply(engine):
    module = nn.Embedding(4, 2)
    parameters, apply = functional(module, engine, input_spec=((None, torch.int64), {}))
    rows = jnp.array([3, 1])
    np.testing.assert_array_equal(apply(parameters, rows), parameters["weight"][rows])


@pytest.mark.parametrize("engine", ENGINES)
def test_errors_name_the_parameter(engine):
    parameters, apply = functional(nn.Linear(3, 2), engine)
    x, weight = jnp.ones(3), parameters["weight"]
    cases = {
        "parameters['bias']: expected float32 (2,), got no such entry": {"weight": weight},
        "parameters['weight']: expected float32 (2, 3), got float32 (3, 2)": parameters
        | {"weight": weight.T},
        "parameters['weight']: expected float32 (2, 3), got float16 (2, 3)": parameters
        | {"weight": weight.astype(jnp.float16)},
        "parameters['more']: expected the module's parameters ['bias', 'weight'], got": parameters
        | {"more": x},
        "parameters['bias']: expected float32 (2,), got 1.0": parameters | {"bias": 1.0},
        "parameters: expected a dict of arrays by parameter name, as from torchcall.functional, "
        "got a tuple": (weight, x),
        "torchcall.functional, got an array, float32 (3,)": x,
        "torchcall.functional, got None": None,
        "torchcall.functional, got nested containers": {"a": parameters},
        "parameters['bias']: expected an array or a Python scalar": parameters | {"bias": object()},
    }
    for message, given in cases.items():
        assert message in error_of(lambda given=given: apply(given, x))
    assert "operand args[0]: expected" in error_of(lambda: apply(parameters, object()))


def test_errors_name_what_is_no_module(tmp_path):
    (tmp_path / "text.pt").write_text("no archive")
    cases = {
        "expected a torch.nn.Module": lambda: torchcall.functional(torch.tanh),
        "got the class Linear": lambda: torchcall.functional(nn.Linear),
        "freeze: expected no such option": lambda: torchcall.functional(Tied(), freeze=True),
        "with x64 off; pass module.float()": lambda: torchcall.functional(Tied().double()),
        "text.pt": lambda: torchcall.functional(tmp_path / "text.pt"),
        "copy.deepcopy": lambda: torchcall.functional(uncopyable()),
    }
    for message, call in cases.items():
        assert message in error_of(call)


def uncopyable():
    module = nn.Linear(1, 1)
    module.generator = (x for x in ())
    return module
