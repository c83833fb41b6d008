"""Small TorchScript modules and helpers that several test modules share."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from torch import Tensor, nn

TESTS = Path(__file__).parent
TIMEOUT = 300  # s, of a program in another process


def double(x: Tensor) -> Tensor:
    return x * 2


def shift(x: Tensor) -> Tensor:
    return x + 1


def subtract(x: Tensor, y: Tensor) -> Tensor:
    return x - y


class Linear(nn.Module):
    """`x @ weight.T + bias + offset`, with seeded weights, in eval mode."""

    def __init__(self, size: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, size, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))
        self.register_buffer("offset", torch.randn(4, generator=generator))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias) + self.offset


class Scale(nn.Module):
    """`x * factor` with a trainable factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Spring(nn.Module):
    """Energy ½ k Σ x² and its gradient, by `torch.autograd.grad` inside `forward`."""

    def __init__(self, stiffness: float = 3.0) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(stiffness))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x.requires_grad_(True)
        energy = 0.5 * self.stiffness * (x * x).sum()
        gradient = torch.autograd.grad([energy], [x])[0]
        assert gradient is not None
        return energy, gradient


class Counter(nn.Module):
    """Adds one to its buffer in each call and returns `x + count`."""

    def __init__(self, count: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()) if count is None else count)

    def forward(self, x: Tensor) -> Tensor:
        self.count.add_(1)
        return x + self.count


class RaisesWhenNegative(nn.Module):
    """`2 * x`; raises ValueError if the sum of `x` is negative."""

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() < 0):
            raise ValueError("the sum is negative")
        return x * 2


def like_input(x: Any, *_: Any) -> Any:
    """An `output_spec`: one output, of the first argument's shape and dtype."""
    return x


def numpy_of(tensor: Tensor) -> np.ndarray:
    """A torch result as NumPy, bfloat16 included."""
    tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jax.numpy.bfloat16)
    return tensor.numpy()


def torch_of(array: Any) -> Tensor:
    """A private torch copy of an array, bfloat16 included."""
    array = np.array(array, order="C")
    if array.dtype == jax.numpy.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def assert_same(got: Any, expected: Any) -> None:
    """Same structure, shapes, dtypes and bits (NaN equals NaN)."""
    expected = jax.tree.map(lambda x: numpy_of(x) if isinstance(x, Tensor) else x, expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(g, jax.Array)
        assert (g.shape, g.dtype) == (np.shape(e), e.dtype)
        np.testing.assert_array_equal(np.asarray(g), e)


def aligned(values: Any) -> np.ndarray:
    """A writable copy whose memory XLA uses in place (64-byte alignment)."""
    values = np.ascontiguousarray(values)
    raw = np.zeros(values.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    array[...] = values
    return array


def error_of(call: Callable[[], Any]) -> str:
    """Returns the text of the error that `call` raises, after checks that apply to every error."""
    kinds = (ValueError, TypeError, NotImplementedError, RuntimeError, OSError, ImportError)
    with pytest.raises(kinds) as caught:  # JAX's own error is a RuntimeError
        jax.block_until_ready(call())
    text = str(caught.value)
    # XLA puts its status code before the text.
    assert re.match(r"([A-Z_]+: )?torchcall: ", text), text
    assert "Exception raised from" not in text
    assert "frame #" not in text
    return text


def run_python(
    folder: Path,
    code: str,
    *,
    name: str = "program.py",
    status: int = 0,
    fresh: bool = False,
    **env: str,
) -> subprocess.CompletedProcess[str]:
    """Runs `code` as a file (TorchScript reads sources) in another process; checks its status.

    The process does not use the compilation cache of the test run.

    Args:
        folder: The file's folder, in which the process starts.
        code: The program, which may be indented.
        name: The file's name.
        status: The exit status that is expected.
        fresh: False: the process is a fork of one that has imported JAX and torch, and all of these
            have the same hash seed and the same addresses of libraries. True: a new interpreter.
        env: Environment variables. Those that are read during imports need `fresh`.
    """
    file = folder / name
    file.write_text(textwrap.dedent(code))
    if fresh:
        done = subprocess.run(
            [sys.executable, str(file)],
            env=_environment() | env,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    else:
        done = _run_in_fork(file, env)
    assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "JAX_COMPILATION_CACHE_DIR": ""}


def _run_in_fork(file: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    if not _fork_servers:
        _fork_servers.append(
            subprocess.Popen(
                [sys.executable, str(TESTS / "fork_server.py")],
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    server = _fork_servers[0]
    assert server.stdin is not None
    assert server.stdout is not None
    outputs = {key: str(file.with_suffix(f".{key}")) for key in ("stdout", "stderr")}
    request = {"file": str(file), "env": env, "timeout": TIMEOUT, **outputs}
    print(json.dumps(request), file=server.stdin, flush=True)
    answer = server.stdout.readline()
    texts = {key: Path(output).read_text() for key, output in outputs.items()}
    return subprocess.CompletedProcess([str(file)], int(answer), **texts)


def stop_fork_server() -> None:
    """Ends the server of this test process, if there is one, and waits for it."""
    while _fork_servers:
        with _fork_servers.pop() as server:
            assert server.stdin is not None
            server.stdin.close()


_fork_servers: list[subprocess.Popen[str]] = []
