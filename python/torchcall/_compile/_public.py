"""`torchcall.compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


def compile(
    module: torch.nn.Module,
    path: str | Path,
    *,
    example: tuple[Any, ...],
    dynamic: Literal["auto"] | bool = "auto",
    device: str | torch.device = "cpu",
    cache: bool = True,
) -> Path:
    """Compiles any module into an AOTInductor package, which `torchcall.load` runs.

    The package is written only after its results have been compared with the module's own on the
    example and, where sizes may vary, on longer inputs made by repeating it: to 1e-10 of the
    largest number of an output in float64, 1e-4 in float32, 2e-2 in half precision; integers must
    be equal.

    For interatomic potentials use `torchcall.mliap.compile`, which derives gradients.

    Args:
        module: an eager module. Its arguments and results are pytrees of tensors. It stays as it
            is: a copy is compiled, in eval mode, its weights constants.
        path: where to write, a name that ends in `.pt2`. An existing file is replaced at the end,
            in one step.
        example: the positional arguments, a tuple of pytrees of arrays of any library. Their dtypes
            are those of the package; torch or NumPy arrays give int64 without x64 in JAX.
        dynamic: "auto": axes of two or more entries may have any size where the module allows it;
            the others, or all, are fixed to the example's. True: an error if all axes are fixed.
            False: all axes are fixed. With TORCHCALL_PROGRESS=1, what is fixed is reported. A
            module that calls `torch.autograd.grad` inside its forward is compiled for fixed sizes.
        device: "cpu" or "cuda".
        cache: whether to reuse packages from, and store them in, `$TORCHCALL_CACHE`, by default
            `torchcall/packages` in the user's cache folder (`~/.cache` on Linux). The key covers
            the operators, the weights, the options, torch and the machine.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        OSError: the path cannot be written.
        CompileError: the module cannot be compiled; the message names the operation.
    """
    # torch's compiler takes seconds to import: only who compiles waits for it.
    from torchcall._compile._module import run
    from torchcall._compile._progress import Progress

    return run(
        module,
        path,
        example=example,
        dynamic=dynamic,
        device=device,
        cache=cache,
        progress=Progress(),
    )
