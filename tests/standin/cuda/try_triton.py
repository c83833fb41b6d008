"""Compares functions that torch.compile makes into Triton kernels with eager torch on the CPU.

python tests/standin/cuda/rehearse.py python tests/standin/cuda/try_triton.py [part of a name]
"""

import sys
import time

import torch

torch._inductor.config.compile_threads = 1
torch.manual_seed(0)

CASES = {}


def case(name, function, *arguments, tolerance=1e-5):
    CASES[name] = (function, arguments, tolerance)


x, y = torch.randn(64, 1000), torch.randn(64, 1000)
at = torch.randint(0, 100, (5000,))
positions = torch.rand(60, 3, dtype=torch.float64) * 6
pairs = torch.combinations(torch.arange(60)).T


def lennard_jones(positions, pairs):
    squares = (positions[pairs[1]] - positions[pairs[0]]).square().sum(-1) + 0.5
    each = 4 * (squares**-6 - squares**-3)
    return torch.zeros(60, dtype=each.dtype, device=each.device).index_add(0, pairs[0], each)


case("elementwise", lambda x, y: (x.sin() * y + 1).relu(), x, y)
case(
    "functions",
    lambda x: x.exp() + x.abs().log() + x.tanh() + x.erf() + x.abs().sqrt() + x.cos(),
    x,
)
case("float64", lambda x: (x.exp() * x.sin()).sigmoid(), x.double())
case("half", lambda x: (x * 2).tanh() + 1, x.half(), tolerance=2e-3)
case("bfloat16", lambda x: (x * 2).tanh() + 1, x.bfloat16(), tolerance=2e-2)
case("integers", lambda a: (a * 7 // 3) % 5 + (a << 2) - (a ^ 3), at)
case("sum", lambda x: x.sum(), x, tolerance=1e-3)
case("sum of rows", lambda x: x.sum(1), x, tolerance=1e-4)
case("sum of columns", lambda x: x.sum(0), x, tolerance=1e-4)
case("mean and deviation", lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), x)
case("softmax", lambda x: x.softmax(-1), x)
case("layer norm", lambda x: torch.nn.functional.layer_norm(x, (1000,)), x)
case("argmax", lambda x: x.argmax(1), x)
case("max", lambda x: x.max(0), x)
case("cumsum", lambda x: x.cumsum(1), x, tolerance=1e-3)
case("transpose", lambda x, y: x.T.contiguous() * 2 + y.T, x, y)
case("gather", lambda x, a: x.flatten()[a] * 2, x, at)
case(
    "index add",
    lambda a, x: torch.zeros(100, device=x.device).index_add(0, a, x * 2),
    at,
    x.flatten()[:5000],
    tolerance=1e-3,
)
case("where", lambda x, y: torch.where(x > y, x, y * 2), x, y)
case("product of matrices", lambda x: (x[:, :, None] * x.T[None]).sum(1), x[:20, :30])
case("sort", lambda x: x.sort(1)[0], x[:, :100])
case("energies of pairs", lennard_jones, positions, pairs)


def main():
    wrong = 0
    for name, (function, arguments, tolerance) in CASES.items():
        if len(sys.argv) > 1 and not any(part in name for part in sys.argv[1:]):
            continue
        torch._dynamo.reset()
        began = time.perf_counter()
        try:
            expected = function(*arguments)
            found = torch.compile(function)(*[a.cuda() for a in arguments])
            leaves = [found], [expected]
            if isinstance(expected, tuple):
                leaves = found, expected
            for a, b in zip(*leaves, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=tolerance, atol=tolerance)
            print(f"right {name}: {time.perf_counter() - began:.1f} s", flush=True)
        except Exception as error:
            wrong += 1
            print(f"WRONG {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    sys.exit(1 if wrong else 0)


main()
