"""Eager modules and functions in jitted programs, compared with the same modules in torch."""

import gc
import threading
import weakref
from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import torchcall
from torchcall import TorchModuleWrapper


class Pair(NamedTuple):
    first: Any
    second: Any


class Mixed(torch.nn.Module):
    """Uses what TorchScript does not support: any container, keywords, Python control flow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, pair, table, *, power=1, negate=False, name="x"):
        value = pair.first * self.weight + table[name]
        for _ in range(power):
            value = value * value
        return OrderedDict(b=-value if negate else value, a=[pair.second + 1, None])


X = np.array([0.5, -1.0, 2.0], np.float32)
SPEC = jax.ShapeDtypeStruct((3,), jnp.float32)


def test_any_pytree_of_arrays_and_scalars_goes_in_and_out():
    module = Mixed()
    f = TorchModuleWrapper(module)
    pair, table = Pair(X, np.arange(4, dtype=np.int32)), {"x": X + 1, "y": X}

    out = jax.jit(lambda p, t: f(p, t, power=2, negate=True, name="y"))(pair, table)

    with torch.no_grad():
        torch_pair = Pair(*map(torch.from_numpy, pair))
        torch_table = {key: torch.from_numpy(value) for key, value in table.items()}
        expected = module(torch_pair, torch_table, power=2, negate=True, name="y")
    assert isinstance(out, OrderedDict)
    np.testing.assert_array_equal(out["b"], expected["b"])
    np.testing.assert_array_equal(out["a"][0], expected["a"][0])
    assert out["a"][1] is None
    assert f.stats()["engine"] == "eager"


def test_a_plain_function_is_a_model():
    f = TorchModuleWrapper(torch.special.bessel_j0)
    np.testing.assert_array_equal(f(X), torch.special.bessel_j0(torch.from_numpy(X)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_compiled_module_is_a_model():
    module = torch.nn.Linear(3, 2)
    f = TorchModuleWrapper(torch.compile(module, backend="eager"))
    with torch.no_grad():
        expected = module(torch.from_numpy(X))
    for _ in range(3):
        np.testing.assert_array_equal(f(X), expected)
    assert "Linear" in repr(f)


def test_a_model_that_differentiates_inside_needs_the_option():
    def forces(x: torch.Tensor) -> torch.Tensor:
        x.requires_grad_(True)
        return -torch.autograd.grad((x**3).sum(), x)[0]

    f = jax.jit(TorchModuleWrapper(forces, requires_grad=True))
    for _ in range(3):
        np.testing.assert_allclose(f(X), -3 * X**2, rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected requires_grad=True, got requires_grad=False"):
        TorchModuleWrapper(forces)(X)


def test_grad_mode_is_set_by_the_wrapper_and_not_by_the_calling_thread():
    modes = []

    def record(x: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        return x + 1

    for requires_grad in (False, True):
        f = TorchModuleWrapper(record, requires_grad=requires_grad, output_spec=SPEC)
        modes.clear()
        f(X)
        with torch.no_grad():
            f(X + 1)
        with torch.inference_mode():
            f(X + 2)
        assert modes[-3:] == [requires_grad] * 3


def test_modes_of_the_calling_thread_do_not_affect_the_model():
    f = TorchModuleWrapper(lambda x: x + torch.ones(3), output_spec=SPEC)
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(f(X), X + 1)


def test_tracing_does_not_change_the_module():
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last: Any = None
            self.calls = 0
            self.norm = torch.nn.BatchNorm1d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last, self.calls = x * 1, self.calls + 1
            return self.norm(x)

    module = Counts().train()
    f = TorchModuleWrapper(module)
    batch = np.stack([X, X + 1, X * 2])
    lowered = jax.jit(f).lower(batch)
    assert module.calls == 0
    assert module.last is None
    assert module.norm.num_batches_tracked == 0

    lowered.compile()(batch)
    assert module.calls == 1
    assert module.norm.num_batches_tracked == 1
    np.testing.assert_array_equal(module.last, batch)


@pytest.mark.parametrize("wrap", [False, True], ids=["a module", "a function of a module"])
def test_tracing_does_not_change_gradients_and_attributes(wrap):
    class Trains(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)
            self.last: Any = None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.layer(x).sum()
            self.last.backward()
            return x + 1

    module = Trains()
    f = TorchModuleWrapper((lambda x: module(x)) if wrap else module, requires_grad=True)
    lowered = jax.jit(f).lower(X)
    assert module.layer.weight.grad is None
    assert module.last is None
    lowered.compile()(X)
    np.testing.assert_array_equal(module.layer.weight.grad, X[None])
    assert type(module.last) is torch.Tensor


def test_weights_are_shared_with_the_module():
    module = torch.nn.Linear(3, 3, bias=False)
    f = jax.jit(TorchModuleWrapper(module))
    f(X)
    with torch.no_grad():
        module.weight.copy_(torch.eye(3) * 5)
    np.testing.assert_array_equal(f(X), 5 * X)
    assert module.weight.requires_grad


def test_an_error_contains_the_python_traceback():
    def inner(x: torch.Tensor) -> torch.Tensor:
        raise KeyError("no such element", len(x))

    f = TorchModuleWrapper(lambda x: inner(x), output_spec=SPEC)
    with pytest.raises(Exception, match=r"raised KeyError: .'no such element'") as caught:
        jax.block_until_ready(jax.jit(f)(X))
    assert "torchcall: <lambda>:" in str(caught.value)
    assert "in inner" in str(caught.value)
    assert "test_eager.py" in str(caught.value)
    np.testing.assert_array_equal(TorchModuleWrapper(torch.neg)(X), -X)  # still usable


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda x: {"a": x}, r"output: expected a tensor, got a dict with keys \['a'\]"),
        (lambda _: 3.0, "output: expected a tensor, got float"),
        (lambda _: None, "output: expected a tensor, got None"),
        (lambda x: x[:2], r"expected float32 \(3,\), got float32 \(2,\)"),
        (lambda x: x.double(), r"expected float32 \(3,\), got float64 \(3,\)"),
        (lambda x: x.to_sparse(), "expected a dense tensor on cpu"),
        (lambda x: x.to("meta"), "expected a dense tensor on cpu"),
    ],
    ids=["a dict", "a float", "None", "another shape", "another dtype", "sparse", "on meta"],
)
def test_results_are_compared_with_the_plan(result, message):
    f = TorchModuleWrapper(result, output_spec=SPEC)
    with pytest.raises(Exception, match=message):
        f(X)


@pytest.mark.parametrize(
    "result, message",
    [
        (lambda x: {"a": x}, r"output \['b'\]: expected this key, got a dict with keys \['a'\]"),
        (lambda x: {"a": x, "b": x, "c": x}, r"output: expected 2 keys, got a dict with keys"),
        (lambda x: (x, x), r"output: expected a dict, got a tuple of 2"),
    ],
    ids=["a missing key", "a key too many", "a tuple"],
)
def test_the_structure_of_results_is_compared_with_the_plan(result, message):
    f = TorchModuleWrapper(result, output_spec={"a": SPEC, "b": SPEC})
    with pytest.raises(Exception, match=message):
        f(X)


def test_conjugated_views_and_results_that_require_grad_have_their_values():
    z = np.array([1 + 2j, 3 - 1j], np.complex64)
    np.testing.assert_array_equal(TorchModuleWrapper(torch.conj)(z), z.conj())
    layer = torch.nn.Linear(3, 3)
    f = TorchModuleWrapper(layer, requires_grad=True)
    np.testing.assert_array_equal(f(X), layer(torch.from_numpy(X)).detach())


@pytest.mark.parametrize(
    "model, message",
    [
        (torch.nn.Linear, "expected a torch.nn.Module.*got the class Linear"),
        (3, "expected a torch.nn.Module.*got int"),
        (None, "expected a torch.nn.Module.*got NoneType"),
    ],
    ids=["a class", "a number", "nothing"],
)
def test_an_object_that_is_not_a_model_is_an_error(model, message):
    with pytest.raises(TypeError, match=message):
        TorchModuleWrapper(model)


def test_torchscript_options_and_weights_without_data_are_errors():
    with pytest.raises(ValueError, match="freeze=True: expected a TorchScript module"):
        TorchModuleWrapper(torch.nn.ReLU(), freeze=True)
    with pytest.raises(ValueError, match="got some on the device 'meta'"):
        TorchModuleWrapper(torch.nn.Linear(3, 3, device="meta"))


def test_a_module_that_cannot_be_traced_needs_an_output_spec():
    def branches(x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x

    with pytest.raises(ValueError, match=r"pass output_spec"):
        TorchModuleWrapper(branches)(X)
    f = jax.jit(TorchModuleWrapper(branches, output_spec=SPEC))
    np.testing.assert_array_equal(f(X), X)
    np.testing.assert_array_equal(f(-X), X)


def test_concurrent_calls_do_not_mix_their_data():
    module = torch.nn.Linear(3, 3)
    f = TorchModuleWrapper(module)
    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 200, lambda _, x: jnp.tanh(f(x)), x))
    inputs = [X + i for i in range(6)]
    expected = [loop(x) for x in inputs]
    out: dict[int, Any] = {}

    def work(i: int) -> None:
        for _ in range(3):
            out[i] = jax.block_until_ready(loop(jnp.asarray(inputs[i])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    # This thread waits for its own calls meanwhile, with and without the GIL.
    for _ in range(3):
        jax.block_until_ready(loop(X))
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    for i in range(6):
        np.testing.assert_array_equal(out[i], expected[i])


def test_an_executable_retains_the_module_after_its_wrapper_is_deleted():
    module = torch.nn.Linear(3, 3, bias=False)
    reference = weakref.ref(module)
    compiled = jax.jit(TorchModuleWrapper(module)).lower(X).compile()
    weight = module.weight.detach().clone()
    del module
    gc.collect()
    np.testing.assert_allclose(compiled(X), weight @ torch.from_numpy(X), rtol=1e-6)
    del compiled
    gc.collect()
    jax.clear_caches()
    gc.collect()
    assert reference() is None


def test_empty_arrays_and_scalars_are_supported():
    f = TorchModuleWrapper(lambda x, y: (x * 2, y.sum()))
    empty, total = f(np.zeros((0, 3), np.float32), np.float32(2))
    assert empty.shape == (0, 3)
    assert total == 2


def test_casts_happen_inside_torch():
    def model(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        assert index.dtype is torch.int64
        return x.index_select(0, index)

    f = TorchModuleWrapper(model, input_spec=((None, torch.int64), {}))
    np.testing.assert_array_equal(f(X, np.array([2, 0], np.int32)), X[[2, 0]])


def test_a_live_module_does_not_pickle():
    import pickle

    with pytest.raises(TypeError, match="a wrapper of a live module cannot be pickled"):
        pickle.dumps(TorchModuleWrapper(torch.nn.ReLU()))


def test_a_pickled_module_loads_with_allow_pickle(tmp_path):
    path = tmp_path / "linear.pt"
    module = torch.nn.Linear(3, 2)
    torch.save(module, path)
    with pytest.raises(ValueError, match="got a pickle"):
        torchcall.load(path)
    f = torchcall.load(path, allow_pickle=True)
    np.testing.assert_array_equal(f(X), module(torch.from_numpy(X)).detach())
