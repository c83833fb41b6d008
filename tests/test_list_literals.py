"""Tensors made from lists, which fake tensors cannot trace inside TorchScript as they are."""

import numpy as np
import pytest
import torch
from models import assert_same, error_of, like_input, run_python, torch_of
from torch import Tensor

from torchcall import TorchModuleWrapper

# torch warns that TorchScript is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

X = np.arange(6, dtype=np.float32).reshape(2, 3)

LITERALS = [
    "torch.tensor([3.0, 2.0, 1.0])",
    "torch.tensor([[3, 2, 1]])",
    "torch.tensor([True, False, True])",
    "torch.tensor([x.size(0), 2, 1])",
    "torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)",
    "torch.as_tensor([3.0, 2.0, 1.0])",
    "x[[0, 1]][0]",
    "x[torch.tensor([0, 1])][0]",
]


def test_models_with_list_literals_are_inferred(tmp_path):
    """In a process of its own, for a literal under fake tensors may end the process."""
    code = """
import jax, numpy as np, torch, torchcall
from torch import Tensor
"""
    for i, literal in enumerate(LITERALS):
        code += f"""
def literal_{i}(x: Tensor) -> Tensor:
    return (x * {literal}).float()
"""
    code += f"""
x = np.arange(6, dtype=np.float32).reshape(2, 3)
for i in range({len(LITERALS)}):
    forward = globals()[f"literal_{{i}}"]
    f = torchcall.TorchModuleWrapper(torch.jit.script(forward))
    np.testing.assert_array_equal(f(x), forward(torch.from_numpy(x)).numpy())
    print(i, end=" ", flush=True)
"""
    assert run_python(tmp_path, code).stdout.split() == [str(i) for i in range(len(LITERALS))]


def test_eager_models_may_call_scripts_with_list_literals(tmp_path):
    """In a process of its own, as above."""
    code = """
import numpy as np, torch, torchcall

def literal(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor([3.0, 2.0, 1.0])

class Part(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x: torch.Tensor, shift: float = 1.0) -> torch.Tensor:
        return literal(x) * self.weight + shift

class Model(torch.nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)

x = np.arange(6, dtype=np.float32).reshape(2, 3)
for part in (torch.jit.script(Part()), torch.jit.script(literal)):
    model = Model(part)
    expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(torchcall.TorchModuleWrapper(model)(x), expected)
    np.testing.assert_array_equal(model(torch.from_numpy(x)).numpy(), expected)
    print("equal", flush=True)
"""
    assert run_python(tmp_path, code).stdout.split() == ["equal"] * 2


def of_a_growing_list(x: Tensor) -> Tensor:
    values = [1.0]
    for i in range(x.size(1) - 1):
        values.append(float(i))  # noqa: PERF401 - TorchScript has no such comprehension
    return x * torch.tensor(values)


def of_a_tensors_values(x: Tensor) -> Tensor:
    values: list[float] = x[0].tolist()
    return x * torch.tensor(values)


@pytest.mark.parametrize("function", [of_a_growing_list, of_a_tensors_values])
def test_lists_of_unknown_lengths_need_an_output_spec(function):
    scripted = torch.jit.script(function)
    text = error_of(lambda: TorchModuleWrapper(scripted)(X))
    assert f"torchcall: {function.__name__}: fake tensors cannot trace" in text
    assert "output_spec=" in text
    f = TorchModuleWrapper(scripted, output_spec=like_input)
    assert_same(f(X), function(torch_of(X)))
