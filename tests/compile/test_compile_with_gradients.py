"""`torchcall.compile(..., gradients=…)`: what is compiled, and what is refused.

torch's compiler is replaced by a function that runs the traced graphs, which are compared with the
module's gradients. `transforms/test_packages.py` tests a compiled package.
"""

import numpy as np
import pytest
import torch

import torchcall


class Calls(torch.nn.Module):
    """Calls a function on its arguments."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class DoublesGradient(torch.autograd.Function):
    """The identity, with twice its gradient."""

    @staticmethod
    def forward(ctx, x):
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        del ctx
        return 2 * g


def compiled(function, example, tmp_path, **options):
    module = Calls(function) if callable(function) else function
    return torchcall.compile(module, tmp_path / "m.pt2", example=example, **options)


def forces(x, *, create_graph):
    y = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad((y**4).sum(), y, create_graph=create_graph)[0]


def energy_and_forces(x):
    """Differentiates inside, and is differentiable again."""
    y = x if x.requires_grad else x.detach().requires_grad_()
    energy = (y**4).sum()
    return energy, torch.autograd.grad(energy, y, create_graph=True)[0]


def writes(x):
    x.mul_(2.0)
    return x**2


X = np.arange(1.0, 7.0).reshape(2, 3)


@pytest.mark.parametrize(
    "function, example, gradients, names, shapes",
    [
        (lambda x, i: x[i] ** 2, (X, np.array([0, 1, 1])), True, ["args[0]"], [["n0", "n1"]]),
        (lambda x, y: x["a"] * y, ({"a": X}, X), 0, ["args[0]['a']"], [["n0", "n1"]]),
        (lambda x, y: (x.sum(), y.exp()), (X, X), (1,), ["args[1]"], [["n0", "n1"]]),
        (lambda x, y: torch.cat([x, y]), (X[0], X[1]), True, ["args[0]", "args[1]"], [[3]]),
        (lambda x: (x.sin(), x.argmax()), (X,), True, ["args[0]"], [["n0", "n1"]]),
        (lambda x: DoublesGradient.apply(x.sin()), (X,), True, ["args[0]"], [["n0", "n1"]]),
        (writes, (X,), True, ["args[0]"], [["n0", "n1"]]),
        (energy_and_forces, (X,), True, ["args[0]"], [["n0", "n1"]]),
    ],
    ids=["an index", "by position", "several outputs", "fixed sizes", "an integer output",
         "an own function", "writes", "differentiates inside"],
)  # fmt: skip
def test_the_gradients_of_float_arguments_are_compiled_for_the_same_sizes(
    function, example, gradients, names, shapes, uncompiled, tmp_path
):
    compiled(function, example, tmp_path, gradients=gradients)
    (metadata,) = uncompiled
    assert metadata["gradients"] == names
    assert [row["shape"] for row in metadata["inputs"]][:1] == shapes


def test_gradients_are_another_package_with_another_content(uncompiled, tmp_path):
    for gradients in (None, True, 0, 1, False, True, 1):
        compiled(lambda x, y: x * y, (X, X), tmp_path, gradients=gradients)
    assert [m.get("gradients") for m in uncompiled] == [
        None, ["args[0]", "args[1]"], ["args[0]"], ["args[1]"]
    ]  # fmt: skip
    assert len({m["content"] for m in uncompiled}) == 4


def test_the_gradients_of_a_branch_on_a_size_are_not_compiled_for_all_sizes(uncompiled, tmp_path):
    class Branches(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (2 if x.shape[0] == 4 else 3)

    def function(x):
        return Branches.apply(x)

    compiled(function, (np.ones(4),), tmp_path, gradients=True)
    (metadata,) = uncompiled
    assert metadata["inputs"][0]["shape"] == [4]
    with pytest.raises(torchcall.CompileError, match=r"branches on|fix a size"):
        compiled(function, (np.ones(4),), tmp_path, gradients=True, dynamic=True)


@pytest.mark.parametrize(
    "function, example, gradients, message",
    [
        (lambda x: x, (X,), "x", "gradients: expected True, or positions of arguments, got 'x'"),
        (lambda x: x, (X,), [True], "gradients: expected True, or positions .* got "),
        (lambda x: x, (X,), 1, "gradients: expected True, or positions of arguments from 0 to 0"),
        (lambda x, i: x[i], (X, [0]), 1, "example"),
        (lambda x, i: x[i], (X, np.array([0])), 1, "with arrays of floats, got 1, which has none"),
        (lambda i: i, (np.array([0]),), True, "got a module without such arguments"),
        (lambda x: x * 1j, (X,), True, "expected real numbers .* got complex128"),
        (lambda x: x.detach() ** 2, (X,), True, "do not depend on it, or are detached"),
        (lambda x: forces(x, create_graph=False), (X,), True, "pass create_graph=True"),
        (lambda x, y: (forces(x, create_graph=True), y), (X, X), (0,), "output.*one without"),
    ],
)  # fmt: skip
def test_gradients_that_cannot_be_compiled_are_an_error_that_says_why(
    function, example, gradients, message, uncompiled, tmp_path
):
    del uncompiled
    with pytest.raises(
        (TypeError, ValueError, torchcall.CompileError), match="torchcall: .*" + message
    ):
        compiled(function, example, tmp_path, gradients=gradients)
    assert not (tmp_path / "m.pt2").exists()
