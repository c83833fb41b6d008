"""Derivatives and `vmap` of a call: µs inside one jitted loop, beside wrap_torch2jax and torch.

    OMP_NUM_THREADS=1 python benchmarks/transforms.py --json benchmarks/results/transforms.json

The module is a small network, scripted: 64 inputs, two hidden layers of 64, one number. "value and
gradient" is `jax.value_and_grad` by the inputs; torch's own loop calls the module and
`torch.autograd.grad` from Python. "64 calls" maps the module over 64 inputs: `jax.vmap` of a
torchcall wrapper, by a loop in C++ (`sequential`) or by one call of the module on all of them
(`expand_dims`), and `jax.lax.map` over wrap_torch2jax. "Parameters as arguments" compares `apply`
of `torchcall.functional` with the wrapper: the value alone, and `jax.value_and_grad` by the inputs
and by the parameters.
"""

import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch
from _harness import PYTHON, TORCHCALL, WRAP, Report, jitted_loop, parser, python_loop
from wrap_torch2jax import torch2jax

import torchcall
from torchcall.demo._timing import Run, timed

WIDE = "torchcall, expand_dims"
N = 64


class Network(torch.nn.Module):
    """One number per row of 64."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (N, N, N)
        self.layers = torch.nn.Sequential(
            *(torch.nn.Sequential(torch.nn.Linear(k, N), torch.nn.Tanh()) for k in sizes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the last layer."""
        return self.layers(x).sum(-1)


def torch_value_and_grad(module: torch.nn.Module, x: torch.Tensor) -> Run:
    """`run(calls)`: value and gradient in a Python loop."""

    def calls_in_a_row(calls: int) -> None:
        for _ in range(calls):
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(module(leaf), leaf)

    return lambda calls: timed(lambda: calls_in_a_row(calls))


def both(f: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """Value and gradient as one array, of which XLA cannot remove a part."""

    def call(x: jax.Array) -> jax.Array:
        value, gradient = jax.value_and_grad(f)(x)
        return value + gradient

    return call


def peer(module: torch.nn.Module, x: jax.Array, depth: int) -> Callable[[jax.Array], jax.Array]:
    """The module through wrap_torch2jax; `depth`: how often it can be differentiated."""
    example = torch.empty(x.shape)
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    return torch2jax(module, example, output_shapes=shape, depth=depth)


def time_functional(report: Report, x: jax.Array) -> None:
    """Times calls that get the parameters beside those of the wrapper."""
    module = torch.jit.script(Network().eval())
    fixed = torchcall.TorchModuleWrapper(module)
    parameters, apply = torchcall.functional(module)

    def by_parameters(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        value, gradients = jax.value_and_grad(apply)(p, x)
        return value + sum(g.sum() for g in jax.tree.leaves(gradients))

    def by_inputs(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return both(lambda x: apply(p, x))(x)

    def count() -> int:
        return apply.stats()["calls"]

    given = (parameters, x)
    case = "parameters as arguments"
    runs = {
        TORCHCALL: jitted_loop(fixed, (x,), lambda: fixed.stats()["calls"]),
        "apply": jitted_loop(apply, given, count),
        "torchcall, gradient": jitted_loop(both(fixed), (x,), lambda: fixed.stats()["calls"]),
        "apply, gradient by the input": jitted_loop(by_inputs, given, count),
        "apply, gradients by parameters": jitted_loop(by_parameters, given, count),
    }
    found = report.time(case, runs)
    us = {name: timing.us_median for name, timing in found.items()}
    report.claim(case, "apply / torchcall", us["apply"] / us[TORCHCALL], 1.5)


def main(argv: list[str] | None = None) -> int:
    """Times both cases."""
    options = parser(__doc__ or "").parse_args(argv)
    report = Report("Derivatives and vmap of a call", options)
    module = torch.jit.script(Network().eval().requires_grad_(False))
    x = jnp.linspace(-1, 1, N, dtype=jnp.float32)
    tensor = torch.from_dlpack(x).clone()

    case = "value and gradient"
    ours = torchcall.TorchModuleWrapper(module)
    theirs = peer(module, x, 1)
    runs = {
        TORCHCALL: jitted_loop(both(ours), (x,), lambda: ours.stats()["calls"]),
        PYTHON: torch_value_and_grad(module, tensor),
        WRAP: jitted_loop(both(theirs), (x,), None),
        "torchcall, the value alone": jitted_loop(ours, (x,), lambda: ours.stats()["calls"]),
        "torch, Python loop, the value alone": python_loop(module, (tensor,), requires_grad=False),
    }
    found = report.time(case, runs)
    us = {name: timing.us_median for name, timing in found.items()}
    report.claim(
        case, "torch's Python loop / torchcall", us[PYTHON] / us[TORCHCALL], 1, at_most=False
    )
    report.claim(case, "wrap_torch2jax / torchcall", us[WRAP] / us[TORCHCALL], 3, at_most=False)

    case = f"{N} calls"
    xs = jnp.stack([x * k for k in range(N)])
    wide = torchcall.TorchModuleWrapper(module, vmap_method="expand_dims")
    plain = peer(module, x, 0)
    runs = {
        TORCHCALL: jitted_loop(jax.vmap(ours), (xs,), lambda: ours.stats()["calls"] // N),
        WIDE: jitted_loop(jax.vmap(wide), (xs,), lambda: wide.stats()["calls"]),
        WRAP: jitted_loop(lambda xs: jax.lax.map(plain, xs), (xs,), None),
    }
    found = report.time(case, runs)
    us = {name: timing.us_median for name, timing in found.items()}
    report.claim(case, "wrap_torch2jax / expand_dims", us[WRAP] / us[WIDE], 10, at_most=False)
    time_functional(report, x)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())
