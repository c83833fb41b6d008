"""What a TorchScript model retains of an input after the call is a private copy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from models import aligned, assert_same, error_of, like_input, run_python, torch_of
from torch import Tensor, nn

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class RetainsInput(nn.Module):
    retained: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.retained = torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.retained
        self.retained = x
        return x + before


class RetainsView(RetainsInput):
    def forward(self, x: Tensor) -> Tensor:
        before = self.retained
        self.retained = x.view(3, 2).t()
        return x + before


class RetainsDetached(RetainsInput):
    def forward(self, x: Tensor) -> Tensor:
        before = self.retained
        self.retained = x.detach()
        return x + before


class RetainsInList(nn.Module):
    retained: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.retained = [torch.zeros(2, 3)]

    def forward(self, x: Tensor) -> Tensor:
        before = self.retained[-1]
        self.retained.append(x)
        return x + before


class RetainsInDict(nn.Module):
    retained: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.retained = {"last": torch.zeros(2, 3)}

    def forward(self, x: Tensor) -> Tensor:
        before = self.retained["last"]
        self.retained["last"] = x[:, :]
        return x + before


class RetainsInTuple(nn.Module):
    retained: tuple[Tensor, int]

    def __init__(self) -> None:
        super().__init__()
        self.retained = (torch.zeros(2, 3), 0)

    def forward(self, x: Tensor) -> Tensor:
        before, calls = self.retained
        self.retained = (x, calls + 1)
        return x + before


class RetainsWhatItWrites(RetainsInput):
    def forward(self, x: Tensor) -> Tensor:
        before = self.retained
        x.mul_(2)
        self.retained = x
        return x + before


class Submodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = RetainsInput()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


SEQUENCE = [np.full((2, 3), i, np.float32) + np.arange(3, dtype=np.float32) for i in range(6)]

RETAINERS = [
    pytest.param(RetainsInput, id="itself"),
    pytest.param(RetainsView, id="a view"),
    pytest.param(RetainsDetached, id="a detached alias"),
    pytest.param(RetainsInList, id="in a list"),
    pytest.param(RetainsInDict, id="a slice in a dict"),
    pytest.param(RetainsInTuple, id="in a tuple"),
    pytest.param(RetainsWhatItWrites, id="after writing to it"),
    pytest.param(Submodule, id="in a submodule"),
]


@pytest.mark.parametrize("make", RETAINERS)
@pytest.mark.parametrize("options", [{}, {"requires_grad": True}], ids=["plain", "with gradients"])
def test_a_retained_input_has_its_own_values(make, options):
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
    assert f.stats()["retained_inputs"] > 0


@pytest.mark.parametrize("make", RETAINERS)
def test_a_retained_input_is_right_inside_a_scan(make):
    eager = make()
    expected = torch.stack([eager(torch_of(values)) for values in SEQUENCE])
    f = TorchModuleWrapper(torch.jit.script(make()))

    @jax.jit
    def program(xs):
        return jax.lax.scan(lambda carry, x: (carry + 1, f(x)), 0, xs)[1]

    assert_same(program(jnp.asarray(np.stack(SEQUENCE))), expected)


class RetainsDict(nn.Module):
    retained: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.retained = {"x": torch.zeros(2, 3)}

    def forward(self, d: dict[str, Tensor]) -> Tensor:
        before = self.retained["x"]
        self.retained = d
        return d["x"] + before


class RetainsList(nn.Module):
    retained: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.retained = [torch.zeros(2, 3)]

    def forward(self, xs: list[Tensor]) -> Tensor:
        before = self.retained[0]
        self.retained = xs
        return xs[0] + before


class RetainsPair(nn.Module):
    retained: tuple[Tensor, list[Tensor]]

    def __init__(self) -> None:
        super().__init__()
        self.retained = (torch.zeros(2, 3), [torch.zeros(2, 3)])

    def forward(self, pair: tuple[Tensor, list[Tensor]]) -> Tensor:
        before = self.retained
        self.retained = pair
        return pair[0] + before[0] + before[1][0]


@pytest.mark.parametrize(
    "make, wrap",
    [
        pytest.param(RetainsDict, lambda x: {"x": x}, id="a dict"),
        pytest.param(RetainsList, lambda x: [x], id="a list"),
        pytest.param(RetainsPair, lambda x: (x, [x]), id="a tuple with a list"),
    ],
)
def test_a_retained_container_has_its_own_values(make, wrap):
    eager = make()
    f = TorchModuleWrapper(torch.jit.script(make()))
    jitted = jax.jit(f)
    for i, values in enumerate(SEQUENCE):
        expected = eager(wrap(torch_of(values)))
        x = aligned(values)
        assert_same((jitted if i % 2 else f)(wrap(x)), expected)
        x[...] = -99


class RetainsHalf(nn.Module):
    retained: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.retained = torch.zeros(2, 3, dtype=torch.float16)

    def forward(self, x: Tensor) -> Tensor:
        before = self.retained
        self.retained = x
        return x + before


def test_a_retained_cast_input_has_its_own_values():
    eager = RetainsHalf()
    f = TorchModuleWrapper(torch.jit.script(RetainsHalf()), input_spec=torch.float16)
    for values in SEQUENCE:
        x = aligned(values)
        assert_same(f(x), eager(torch_of(values).half()))
        x[...] = -99


class RetainsThenRaises(nn.Module):
    retained: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.retained = torch.zeros(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.retained = x
        if bool(x.sum() > 0):
            raise ValueError("the sum is positive")
        return x + 1


def test_a_module_that_retains_its_input_and_raises_has_a_copy():
    module = torch.jit.script(RetainsThenRaises())
    f = TorchModuleWrapper(module, output_spec=like_input)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for call in (f, jax.jit(f)):
        x = aligned(values)
        assert "the sum is positive" in error_of(lambda call=call, x=x: call(x))
        x[...] = -99
        np.testing.assert_array_equal(module.retained.numpy(), values)
    assert_same(f(-values), -values + 1)


def test_a_retained_tensor_is_not_the_callers_memory():
    module = torch.jit.script(RetainsInput())
    f = TorchModuleWrapper(module)
    x = aligned(SEQUENCE[2])
    jax.block_until_ready(f(x))
    x[...] = -99
    np.testing.assert_array_equal(module.retained.numpy(), SEQUENCE[2])
    module.retained.zero_()
    np.testing.assert_array_equal(x, -99)


class Passes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.t()


def test_returning_the_input_or_a_view_of_it_does_not_retain_it():
    f = TorchModuleWrapper(torch.jit.script(Passes()))
    x = aligned(SEQUENCE[1])
    same, transposed = jax.jit(f)(x)
    jax.block_until_ready((same, transposed))
    x[...] = -99
    np.testing.assert_array_equal(same, SEQUENCE[1])
    np.testing.assert_array_equal(transposed, SEQUENCE[1].T)
    assert f.stats()["retained_inputs"] == 0


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


OUT_OF_MEMORY = """
    import resource
    import jax, numpy as np, torch, torchcall
    from models import double, error_of
    from torch import Tensor, nn

    class Retains(nn.Module):
        retained: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.retained = torch.zeros(1)

        def forward(self, x: Tensor, fails: bool) -> Tensor:
            self.retained = x
            if fails:
                raise ValueError("no good")
            return x[:3] * 2

    module = torch.jit.script(Retains())
    spec = jax.ShapeDtypeStruct((3,), np.float32)
    f = torchcall.TorchModuleWrapper(module, output_spec=spec)
    small, expected = np.ones(4, np.float32), np.full(3, 2, np.float32)
    large = jax.block_until_ready(jax.numpy.ones(1 << 28, np.float32))  # 1 GiB
    np.testing.assert_array_equal(f(small, False), expected)
    in_use = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (1 << 29), resource.RLIM_INFINITY))

    text = error_of(lambda: f(large, False))
    assert "args[0]: expected memory for a copy of this input, which the model retained" in text
    assert "no good" in error_of(lambda: f(large, True))
    for read in (lambda: module.retained[:3] + 1, lambda: module.retained.numpy()):
        try:
            read()
            raise SystemExit("what there was no memory for was read")
        except RuntimeError as error:
            assert "there was no memory for a copy" in str(error), error
    np.testing.assert_array_equal(f(small, False), expected)  # process and model stay usable
    np.testing.assert_array_equal(module.retained.numpy(), small)
    double = torchcall.TorchModuleWrapper(torch.jit.script(double))
    np.testing.assert_array_equal(double(small), 2 * small)
    print("done")
"""


def test_a_retained_input_without_memory_for_its_copy_is_an_error(tmp_path):
    assert run_python(tmp_path, OUT_OF_MEMORY).stdout == "done\n"
