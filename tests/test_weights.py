"""Weights are shared with the caller's module, which never changes, whatever mode torch is in."""

import contextlib

import jax
import numpy as np
import pytest
import torch
from models import Linear, Scale, Spring, assert_same, error_of, numpy_of, torch_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("options", [{}, {"requires_grad": True}], ids=["plain", "with gradients"])
def test_weights_changed_in_place_are_seen_by_compiled_programs(options):
    module = torch.jit.script(Scale(2.0))
    f = TorchModuleWrapper(module, **options)
    assert f.stats()["weights"] == "shared"
    program = jax.jit(f)
    assert_same(program(X), 2 * X)
    with torch.no_grad():
        module.factor.fill_(5.0)
    assert_same(program(X), 5 * X)
    assert_same(f(X), 5 * X)


@pytest.mark.parametrize("options", [{}, {"requires_grad": True}], ids=["plain", "with gradients"])
def test_refresh_uses_a_replaced_parameter(options):
    module = torch.jit.script(Scale(2.0))
    f = TorchModuleWrapper(module, **options)
    program = jax.jit(f)
    assert_same(program(X), 2 * X)
    module.factor = nn.Parameter(torch.tensor(7.0))
    f.refresh()
    assert_same(program(X), 7 * X)
    assert_same(f(X), 7 * X)


def test_refresh_updates_the_weights_of_frozen_code():
    module = torch.jit.script(Scale(2.0).eval())
    f = TorchModuleWrapper(module, freeze=True)
    program = jax.jit(f)
    assert_same(program(X), 2 * X)
    with torch.no_grad():
        module.factor.fill_(5.0)
    f.refresh()
    assert_same(program(X), 5 * X)


def test_refresh_of_frozen_code_with_the_same_weights_changes_nothing():
    module = torch.jit.script(Mixed().eval())
    f = TorchModuleWrapper(module, freeze=True)
    before = f(X)
    f.refresh()
    assert_same(f(X), np.asarray(before))


def test_refresh_reloads_a_file(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(Scale(2.0)).save(path)
    f = TorchModuleWrapper(path)
    program = jax.jit(f)
    assert_same(program(X), 2 * X)
    torch.jit.script(Scale(3.0)).save(path)
    assert_same(program(X), 2 * X)
    f.refresh()
    assert_same(program(X), 3 * X)


def test_refresh_reloads_the_same_file_from_another_working_directory(tmp_path, monkeypatch):
    for name, factor in (("here", 2.0), ("there", 9.0)):
        (tmp_path / name).mkdir()
        torch.jit.script(Scale(factor)).save(tmp_path / name / "model.pt")
    monkeypatch.chdir(tmp_path / "here")
    f = TorchModuleWrapper("model.pt")
    assert_same(f(X), 2 * X)
    monkeypatch.chdir(tmp_path / "there")
    f.refresh()
    assert_same(f(X), 2 * X)
    assert_same(f(X[:1]), 2 * X[:1])


def test_refresh_refuses_other_code_and_retains_the_old_model(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(Scale(2.0)).save(path)
    f = TorchModuleWrapper(path)
    assert_same(f(X), 2 * X)
    torch.jit.script(Linear()).save(path)
    text = error_of(f.refresh)
    assert "refresh" in text
    assert "expected" in text
    assert_same(f(X[:1]), 2 * X[:1])
    path.unlink()
    assert "model.pt" in error_of(f.refresh)
    assert_same(f(X[:, :1]), 2 * X[:, :1])


def test_change_of_a_file_after_loading_has_no_effect_on_the_first_call(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.script(Scale(2.0)).save(path)
    f = TorchModuleWrapper(path)
    torch.jit.script(Linear()).save(path)
    assert_same(f(X), 2 * X)
    path.unlink()
    assert_same(f(X[:1]), 2 * X[:1])


def test_refresh_with_weights_of_another_shape_is_an_error_at_the_call():
    module = torch.jit.script(Linear())
    f = TorchModuleWrapper(module)
    program = jax.jit(f)
    jax.block_until_ready(program(X))
    for name, shape in (("weight", (5, 3)), ("bias", (5,))):
        setattr(module, name, nn.Parameter(torch.ones(shape)))
    module.offset = torch.ones(5)
    f.refresh()
    assert "expected float32 (2, 4), got float32 (2, 5)" in error_of(lambda: program(X))
    assert_same(f(X[:1]), module(torch_of(X[:1])))


def test_freeze_requires_eval_mode():
    module = torch.jit.script(Linear().train())
    text = error_of(lambda: TorchModuleWrapper(module, freeze=True))
    assert text.startswith("torchcall: Linear: freeze=True: expected ")
    assert "eval" in text
    assert module.training
    module.eval()
    assert_same(TorchModuleWrapper(module, freeze=True)(X), module(torch_of(X)))


class Mixed(nn.Module):
    """Submodules in different modes, parameters with different flags, attributes of many kinds."""

    count: int
    cache: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Linear(3, 3)
        self.fixed = nn.Linear(3, 3).requires_grad_(False)
        self.dropout = nn.Dropout(0.5).eval()
        self.register_buffer("table", torch.arange(3, dtype=torch.float64))
        self.count = 3
        self.cache = [torch.ones(3)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.fixed(self.trained(x)))
        return y + self.table.float() * self.count + self.cache[0]


@pytest.mark.parametrize(
    "options", [{}, {"requires_grad": True}, {"freeze": True}], ids=["plain", "grad", "freeze"]
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "in eval mode"])
def test_the_callers_module_is_left_unchanged(options, training):
    if training and options.get("freeze"):
        pytest.skip("freezing requires eval mode")
    module = torch.jit.script(Mixed().train(training))
    module.dropout.eval()

    def snapshot():
        tensors = {**module.state_dict(keep_vars=True), "cache": module.cache[0]}
        described = {
            name: (t.data_ptr(), t.dtype, t.device, t.requires_grad, t.is_inference(), t.tolist())
            for name, t in tensors.items()
        }
        modes = {name: m.training for name, m in module.named_modules()}
        return described, modes, module.count, len(module.cache), str(module.graph), module.code

    before = snapshot()
    f = TorchModuleWrapper(module, **options)
    jax.block_until_ready([f(X), jax.jit(f)(X), f(X[:1])])
    f.warmup(X)
    f.refresh()
    assert snapshot() == before
    loss = module(torch_of(X)).sum()  # and torch can still train it
    loss.backward()
    assert module.trained.weight.grad is not None
    assert module.fixed.weight.grad is None


def test_differentiating_model_with_trainable_weights_equals_eager_torch():
    module = torch.jit.script(Spring())
    f = TorchModuleWrapper(module, requires_grad=True)
    for _ in range(3):
        assert_same(jax.jit(f)(X), Spring()(torch_of(X)))
    assert module.stiffness.requires_grad
    assert module.stiffness.grad is None


@pytest.mark.parametrize("given", [False, True], ids=["inferred", "with an output_spec"])
def test_forgetting_requires_grad_is_an_error_that_names_it(given):
    spec = (lambda x: (jax.ShapeDtypeStruct((), "f4"), x)) if given else None
    f = TorchModuleWrapper(torch.jit.script(Spring()), output_spec=spec)
    for call in (f, jax.jit(f)):
        text = error_of(lambda call=call: call(X))
        assert "torchcall: Spring: " in text
        assert "requires_grad=True" in text
    assert_same(TorchModuleWrapper(torch.jit.script(Scale(2.0)))(X), 2 * X)


@contextlib.contextmanager
def inside_vmap():
    """The state of a thread that runs `torch.vmap`."""
    torch._C._functorch._vmap_increment_nesting(2, "error")
    try:
        yield
    finally:
        torch._C._functorch._vmap_decrement_nesting()


class Composed(nn.Module):
    """Has a submodule, and a constant expression that TorchScript folds."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * (torch.linspace(1.0, 3.0, 3) * 2)


class Differentiating(Composed):
    def forward(self, x: Tensor) -> Tensor:
        x.requires_grad_(True)
        weights = torch.linspace(1.0, 3.0, 3) * 2
        energy = (self.linear(x) * weights * x).sum()
        gradient = torch.autograd.grad([energy], [x])[0]
        assert gradient is not None
        return gradient


MODES = [
    pytest.param(torch.no_grad, id="no_grad"),
    pytest.param(torch.enable_grad, id="enable_grad"),
    pytest.param(torch.inference_mode, id="inference_mode"),
    pytest.param(lambda: torch.autocast("cpu", dtype=torch.bfloat16), id="autocast"),
    pytest.param(FakeTensorMode, id="FakeTensorMode"),
    pytest.param(lambda: FakeTensorMode(allow_non_fake_inputs=True), id="lenient FakeTensorMode"),
    pytest.param(inside_vmap, id="vmap"),
    pytest.param(lambda: torch.device("meta"), id="the meta device"),
    pytest.param(lambda: torch.jit.optimized_execution(False), id="no optimised execution"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stage", ["making the wrapper", "the first call", "later calls"])
@pytest.mark.parametrize("kind", ["plain", "differentiating", "path"])
def test_torch_mode_of_the_calling_thread_does_not_influence_a_call(mode, stage, kind, tmp_path):
    module = Differentiating() if kind == "differentiating" else Composed()
    scripted = torch.jit.script(module)
    expected = numpy_of(module(torch_of(X)))
    if kind == "path":
        scripted.save(tmp_path / "model.pt")

    def during(name):
        return mode() if stage == name else contextlib.nullcontext()

    with during("making the wrapper"):
        f = TorchModuleWrapper(
            tmp_path / "model.pt" if kind == "path" else scripted,
            requires_grad=kind == "differentiating",
        )
    with during("the first call"):
        first = f(X)
    with during("later calls"):
        results = [first, f(X), jax.jit(f)(X)]
    for got in results:
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_weights_on_the_meta_device_are_an_error():
    module = torch.jit.script(Linear().to("meta"))
    text = error_of(lambda: TorchModuleWrapper(module))
    assert text.startswith("torchcall: Linear: ")
    assert "weight" in text
    assert "meta" in text


def test_repr_is_one_readable_line(tmp_path):
    torch.jit.script(Linear()).save(tmp_path / "model.pt")
    f = TorchModuleWrapper(torch.jit.script(Linear()), requires_grad=True, input_spec=torch.float32)
    f(X)
    assert "\n" not in repr(f)
    for part in ("TorchModuleWrapper", "Linear", "TorchScript", "requires_grad=True", "calls=1"):
        assert part in repr(f)
    assert "model.pt" in repr(TorchModuleWrapper(tmp_path / "model.pt"))


def test_stats_count_calls_and_bytes():
    f = TorchModuleWrapper(torch.jit.script(Linear()), input_spec=torch.float32)
    for _ in range(3):
        jax.block_until_ready(f(X))
    stats = f.stats()
    assert stats["engine"] == "TorchScript"
    assert stats["calls"] == 3
    assert stats["bytes_copied"] == 3 * 2 * 4 * 4
    assert stats["plans"] == 1
    assert stats["fallback"] is None
    assert (stats["graph_captures"], stats["graph_replays"]) == (0, 0)
    assert stats["devices"] == ["cpu"]


def test_stats_count_the_bytes_of_casts():
    f = TorchModuleWrapper(torch.jit.script(Linear()), input_spec=torch.float32)
    jax.block_until_ready(f(X.astype(np.int32)))
    assert f.stats()["bytes_copied"] == X.size * 4 + 2 * 4 * 4
