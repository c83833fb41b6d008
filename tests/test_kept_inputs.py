"""A module that keeps an operand after the call keeps a private copy, never the caller's memory."""

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


class KeepsInput(nn.Module):
    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.kept
        self.kept = x
        return x + before


class KeepsView(KeepsInput):
    def forward(self, x: Tensor) -> Tensor:
        before = self.kept
        self.kept = x.view(3, 2).t()
        return x + before


class KeepsDetached(KeepsInput):
    def forward(self, x: Tensor) -> Tensor:
        before = self.kept
        self.kept = x.detach()
        return x + before


class KeepsInList(nn.Module):
    kept: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.zeros(2, 3)]

    def forward(self, x: Tensor) -> Tensor:
        before = self.kept[-1]
        self.kept.append(x)
        return x + before


class KeepsInDict(nn.Module):
    kept: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"last": torch.zeros(2, 3)}

    def forward(self, x: Tensor) -> Tensor:
        before = self.kept["last"]
        self.kept["last"] = x[:, :]
        return x + before


class KeepsInTuple(nn.Module):
    kept: tuple[Tensor, int]

    def __init__(self) -> None:
        super().__init__()
        self.kept = (torch.zeros(2, 3), 0)

    def forward(self, x: Tensor) -> Tensor:
        before, calls = self.kept
        self.kept = (x, calls + 1)
        return x + before


class KeepsWhatItWrites(KeepsInput):
    def forward(self, x: Tensor) -> Tensor:
        before = self.kept
        x.mul_(2)
        self.kept = x
        return x + before


class Submodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = KeepsInput()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


SEQUENCE = [np.full((2, 3), i, np.float32) + np.arange(3, dtype=np.float32) for i in range(6)]

KEEPERS = [
    pytest.param(KeepsInput, id="itself"),
    pytest.param(KeepsView, id="a view"),
    pytest.param(KeepsDetached, id="a detached alias"),
    pytest.param(KeepsInList, id="in a list"),
    pytest.param(KeepsInDict, id="a slice in a dict"),
    pytest.param(KeepsInTuple, id="in a tuple"),
    pytest.param(KeepsWhatItWrites, id="after writing to it"),
    pytest.param(Submodule, id="in a submodule"),
]


@pytest.mark.parametrize("make", KEEPERS)
@pytest.mark.parametrize("options", [{}, {"requires_grad": True}], ids=["plain", "with gradients"])
def test_module_that_keeps_its_input_remembers_the_right_values(make, options):
    eager = make()
    f = TorchModuleWrapper(torch.jit.script(make()), **options)
    jitted = jax.jit(f)
    for i, values in enumerate(SEQUENCE):
        expected = eager(torch_of(values))
        x = aligned(values)
        assert_same((jitted if i % 2 else f)(x), expected)
        np.testing.assert_array_equal(x, values)
        x[...] = -99  # the caller's memory is the caller's again
        del x
    assert f.stats()["kept_inputs"] > 0


@pytest.mark.parametrize("make", KEEPERS)
def test_module_that_keeps_its_input_is_right_inside_a_scan(make):
    eager = make()
    expected = torch.stack([eager(torch_of(values)) for values in SEQUENCE])
    f = TorchModuleWrapper(torch.jit.script(make()))

    @jax.jit
    def program(xs):
        return jax.lax.scan(lambda carry, x: (carry + 1, f(x)), 0, xs)[1]

    assert_same(program(jnp.asarray(np.stack(SEQUENCE))), expected)


class KeepsDict(nn.Module):
    kept: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.kept = {"x": torch.zeros(2, 3)}

    def forward(self, d: dict[str, Tensor]) -> Tensor:
        before = self.kept["x"]
        self.kept = d
        return d["x"] + before


class KeepsList(nn.Module):
    kept: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.kept = [torch.zeros(2, 3)]

    def forward(self, xs: list[Tensor]) -> Tensor:
        before = self.kept[0]
        self.kept = xs
        return xs[0] + before


class KeepsPair(nn.Module):
    kept: tuple[Tensor, list[Tensor]]

    def __init__(self) -> None:
        super().__init__()
        self.kept = (torch.zeros(2, 3), [torch.zeros(2, 3)])

    def forward(self, pair: tuple[Tensor, list[Tensor]]) -> Tensor:
        before = self.kept
        self.kept = pair
        return pair[0] + before[0] + before[1][0]


@pytest.mark.parametrize(
    "make, wrap",
    [
        pytest.param(KeepsDict, lambda x: {"x": x}, id="a dict"),
        pytest.param(KeepsList, lambda x: [x], id="a list"),
        pytest.param(KeepsPair, lambda x: (x, [x]), id="a tuple with a list"),
    ],
)
def test_module_that_keeps_a_container_remembers_the_right_values(make, wrap):
    eager = make()
    f = TorchModuleWrapper(torch.jit.script(make()))
    jitted = jax.jit(f)
    for i, values in enumerate(SEQUENCE):
        expected = eager(wrap(torch_of(values)))
        x = aligned(values)
        assert_same((jitted if i % 2 else f)(wrap(x)), expected)
        x[...] = -99


class KeepsHalf(nn.Module):
    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(2, 3, dtype=torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        before = self.kept
        self.kept = x
        return x + before


def test_kept_input_with_a_cast_remembers_the_right_values():
    eager = KeepsHalf()
    f = TorchModuleWrapper(torch.jit.script(KeepsHalf()), input_spec=torch.float16)
    for values in SEQUENCE:
        x = aligned(values)
        assert_same(f(x), eager(torch_of(values).half()))
        x[...] = -99


class KeepsThenRaises(nn.Module):
    kept: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        if bool(x.sum() > 0):
            raise ValueError("the sum is positive")
        return x + 1


def test_module_that_keeps_its_input_and_raises_keeps_a_copy():
    module = torch.jit.script(KeepsThenRaises())
    f = TorchModuleWrapper(module, output_spec=like_input)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for call in (f, jax.jit(f)):
        x = aligned(values)
        assert "the sum is positive" in error_of(lambda call=call, x=x: call(x))
        x[...] = -99
        np.testing.assert_array_equal(module.kept.numpy(), values)
    assert_same(f(-values), -values + 1)


def test_kept_tensor_read_from_python_is_the_callers_no_more():
    module = torch.jit.script(KeepsInput())
    f = TorchModuleWrapper(module)
    x = aligned(SEQUENCE[2])
    jax.block_until_ready(f(x))
    x[...] = -99
    np.testing.assert_array_equal(module.kept.numpy(), SEQUENCE[2])
    module.kept.zero_()
    np.testing.assert_array_equal(x, -99)


class Passes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.t()


def test_returning_the_input_or_a_view_of_it_is_not_keeping_it():
    f = TorchModuleWrapper(torch.jit.script(Passes()))
    x = aligned(SEQUENCE[1])
    same, transposed = jax.jit(f)(x)
    jax.block_until_ready((same, transposed))
    x[...] = -99
    np.testing.assert_array_equal(same, SEQUENCE[1])
    np.testing.assert_array_equal(transposed, SEQUENCE[1].T)
    assert f.stats()["kept_inputs"] == 0


class ForksAndForgets(nn.Module):
    """Starts work on its input that nobody waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(()))

    def work(self, x: Tensor) -> Tensor:
        for _ in range(200):
            x = x + torch.sin(x) * 0
        self.total.add_(x.sum())
        return x

    def forward(self, x: Tensor) -> Tensor:
        torch.jit.fork(self.work, x)
        return x + 1


def test_work_that_a_module_leaves_behind_never_reads_freed_memory():
    f = TorchModuleWrapper(torch.jit.script(ForksAndForgets()))
    for i in range(20):
        x = np.full((100, 100), i, np.float32)
        assert_same(jax.jit(f)(x), x + 1)
