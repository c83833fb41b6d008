"""Calls that get a module's parameters, against the same function in JAX, in float64."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from models import error_of
from torch import Tensor, nn
from twins import ENGINES, assert_close, random

import torchcall


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Network(nn.Module):
    """Two layers in a list, a shared part, a buffer, and attributes that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.readout = nn.Sequential(nn.Tanh(), nn.Linear(3, 2))
        self.gain = nn.Parameter(torch.ones(()))
        self.register_buffer("scale", torch.tensor(2.0))
        self.power = 2
        self.double()
        for value in self.parameters():
            value.data = torch.randn(value.shape, generator=generator, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.scale
        return self.gain * self.readout(x).pow(self.power)


def network_in_jax(p, x):
    for k in range(2):
        x = jnp.tanh(x @ p[f"layers.{k}.weight"].T + p[f"layers.{k}.bias"]) * 2.0
    return p["gain"] * (jnp.tanh(x) @ p["readout.1.weight"].T + p["readout.1.bias"]) ** 2


def functional(module, engine, **options):
    if engine == "TorchScript":
        module = torch.jit.script(module)
    parameters, apply = torchcall.functional(module, **options)
    assert apply.stats()["engine"] == engine
    return parameters, apply


def scaled(parameters, factor=0.5):
    return jax.tree.map(lambda a: factor * a, parameters)


def stacked(parameters, n=3):
    return jax.tree.map(lambda a: jnp.stack([a * (1 + 0.1 * k) for k in range(n)]), parameters)


def loss(f):
    return lambda p, x: (f(p, x) ** 2).sum()


def slope(f):
    """A loss of derivatives by the input, as forces are."""
    return lambda p, x: (jax.grad(lambda x: f(p, x).sum())(x) ** 2).sum()


def steps(f):
    def step(p, x):
        return jax.tree.map(lambda a, g: a - 1e-3 * g, p, jax.grad(loss(f))(p, x)), None

    return lambda p, x: jax.lax.scan(step, p, jnp.stack([x, x + 1, x - 1]))[0]


TRANSFORMS = {
    "value": lambda f: jax.jit(f),
    "grad by both": lambda f: jax.jit(jax.grad(loss(f), (0, 1))),
    "grad of slopes": lambda f: jax.jit(jax.value_and_grad(slope(f))),
    "jvp": lambda f: lambda p, x: jax.jvp(f, (p, x), (scaled(p), x + 1)),
    "jacfwd": lambda f: jax.jit(jax.jacfwd(f)),
    "hessian": lambda f: jax.jit(jax.hessian(lambda g, p, x: loss(f)(p | {"gain": g}, x))),
    "ensemble": lambda f: lambda p, x: jax.jit(jax.vmap(f, (0, None)))(stacked(p), x),
    "gradients of an ensemble": lambda f: (
        lambda p, x: jax.jit(jax.vmap(jax.grad(loss(f), (0, 1)), (0, None)))(stacked(p), x)
    ),
    "gradients per sample": lambda f: jax.jit(jax.vmap(jax.grad(loss(f)), (None, 0))),
    "steps of training in a scan": lambda f: jax.jit(steps(f)),
    "remat": lambda f: jax.grad(jax.checkpoint(loss(f))),
}
QUICK = {
    "TorchScript": ("grad by both", "grad of slopes", "ensemble", "steps of training in a scan"),
    "eager": ("grad of slopes", "gradients of an ensemble"),
}


def slow_unless(quick):
    return () if quick else pytest.mark.slow


@pytest.mark.parametrize(
    "engine, name",
    [pytest.param(e, n, marks=slow_unless(n in QUICK[e])) for e in ENGINES for n in TRANSFORMS],
)
def test_transformations_are_those_of_the_function_in_jax(engine, name):
    parameters, apply = functional(Network(), engine)
    p, x = scaled(parameters), random(4, 3)
    given = (p["gain"], p, x) if name == "hessian" else (p, x)
    expected = TRANSFORMS[name](network_in_jax)(*given)
    assert_close(TRANSFORMS[name](apply)(*given), expected)


MAPPED = ("batch", "grad of a batch", "gradients per sample", "ensemble")


@pytest.mark.parametrize(
    "method, name",
    [
        pytest.param(m, n, marks=slow_unless(m == "expand_dims" and n != "batch"))
        for m in ("expand_dims", "broadcast_all", "torch")
        for n in MAPPED
    ],
)
def test_a_mapped_input_needs_no_mapped_parameters(method, name):
    transforms = TRANSFORMS | {
        "batch": lambda f: jax.vmap(f, (None, 0)),
        "grad of a batch": lambda f: jax.grad(loss(jax.vmap(f, (None, 0)))),
    }
    parameters, apply = functional(Network(), "eager", vmap_method=method)
    p, x = scaled(parameters), random(4, 3)
    assert_close(transforms[name](apply)(p, x), transforms[name](network_in_jax)(p, x))
    if name == "batch":
        assert apply.stats()["calls"] == 1


class Forces(nn.Module):
    """An energy with a shift, and its gradients, by autograd inside."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.shift = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_(True)
        energy = self.k * x.pow(4).sum() + self.shift
        gradient = torch.autograd.grad([energy], [x], create_graph=True)[0]
        assert gradient is not None
        return energy, gradient


@pytest.mark.parametrize("engine", ENGINES)
def test_a_module_that_differentiates_inside_is_trained_on_its_forces(engine):
    parameters, apply = functional(Forces(), engine, requires_grad=True)
    x = random(3)
    gradient = jax.jit(jax.grad(lambda p: (apply(p, x)[1] ** 2).sum()))(parameters)
    expected = {"k": 32 * 1.5 * (x**6).sum(), "shift": jnp.zeros(())}
    assert_close(gradient, expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_adam_takes_the_steps_of_torchs_adam(engine):
    module, x, y = Network(), random(8, 3), random(8, 2, seed=1)
    parameters, apply = functional(module, engine)
    optimiser = optax.adam(1e-2)

    @jax.jit
    @jax.numpy_dtype_promotion("standard")  # optax needs it
    def step(p, state):
        value, gradient = jax.value_and_grad(lambda p: ((apply(p, x) - y) ** 2).mean())(p)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(p, updates), state, value

    state = optimiser.init(parameters)
    reference = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(10):
        parameters, state, value = step(parameters, state)
        reference.zero_grad()
        expected = (module(torch.tensor(np.array(x))) - torch.tensor(np.array(y))).pow(2).mean()
        expected.backward()
        reference.step()
        np.testing.assert_allclose(value, expected.item(), rtol=1e-11)
    for key, weight in module.named_parameters():
        np.testing.assert_allclose(parameters[key], weight.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_threads_use_their_own_parameters(engine):
    parameters, apply = functional(Network(), engine)
    x, failures = random(16, 3), []

    @jax.enable_x64(True)  # a setting of the thread
    def work(k):
        p = scaled(parameters, 1 + k)
        expected = network_in_jax(p, x), jax.grad(loss(network_in_jax))(p, x)
        f = jax.jit(lambda p, x: (apply(p, x), jax.grad(loss(apply))(p, x)))
        for _ in range(10):
            try:
                assert_close(f(p, x), expected)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if bool((x < 0).any()):
            raise ValueError("expected x >= 0")
        return x * self.weight


@pytest.mark.parametrize("engine", ENGINES)
def test_a_call_that_raised_leaves_no_parameters_behind(engine):
    spec = jax.ShapeDtypeStruct((2,), "float64")
    parameters, apply = functional(Picky(), engine, output_spec=spec)
    x = jnp.ones(2)
    assert "expected x >= 0" in error_of(lambda: apply(scaled(parameters, 9.0), -x))
    assert_close(apply(parameters, x), x)
    assert_close(jax.grad(lambda p: apply(p, x).sum())(parameters), {"weight": x})
