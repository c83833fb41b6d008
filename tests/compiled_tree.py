"""A module of pytrees, its package with gradients, and the same function in JAX."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from filelock import FileLock
from torch._inductor import config as inductor

import torchcall

WEIGHT = np.arange(12.0, dtype=np.float32).reshape(4, 3)


class Tree(torch.nn.Module):
    """A matrix product, selected rows and sums. Arguments and results are pytrees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHT.copy()))

    def forward(self, x, more):
        # A product with one column: torch's compiler must not limit the sizes because of it.
        product = x[:, :1] @ self.weight[:1] + x[:, 1:] @ self.weight[1:]
        rows = product.index_select(0, more["index"])
        sums = [more["w"].square().sum(0), (x.sum(),)]
        return {"rows": rows, "sums": sums, "total": x.sin().sum()}


def reference(x, more):
    """`Tree` in JAX."""
    rows = (x @ WEIGHT)[more["index"]]
    sums = [jnp.square(more["w"]).sum(0), (x.sum(),)]
    return {"rows": rows, "sums": sums, "total": jnp.sin(x).sum()}


def arguments(n, k, m):
    """`x` of n rows, k indices of rows, and `w` of m rows, in NumPy."""
    random = np.random.default_rng(n)
    x = random.normal(size=(n, 4)).astype(np.float32)
    w = random.normal(size=(m, 2)).astype(np.float32)
    return x, {"index": random.integers(0, n, k), "w": w}


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """The package of `Tree`, shared by all test processes."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "tree.pt2"
    # The code around the kernels takes half of the time to compile.
    quick = inductor.patch({"aot_inductor.compile_wrapper_opt_level": "O0"})
    with FileLock(folder / "tree.lock"), pytest.MonkeyPatch.context() as patch, quick:
        patch.setenv("TORCHCALL_CACHE", str(folder / "cache"))
        if not path.exists():
            torchcall.compile(
                Tree(), path, example=arguments(5, 3, 6), dynamic=True, gradients=True
            )
    return path


def load(path, **options):
    """The wrapper, which takes 32-bit indices."""
    casts = (None, {"index": torch.int64, "w": None})
    return torchcall.load(path, **{"input_spec": (casts, {})} | options)
