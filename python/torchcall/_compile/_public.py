"""`torchcall.compile`."""

from __future__ import annotations

from collections.abc import Sequence
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
    gradients: bool | int | Sequence[int] | None = None,
    parallel: bool = False,
) -> Path:
    """Compiles any module into an AOTInductor package, which `torchcall.load` loads.

    Before it is written, its results are compared with the module's: on the example and, if sizes
    may vary, on longer inputs made by repeating it. Tolerances, relative to the largest absolute
    value of an output: 1e-10 in float64, 1e-4 in float32, 2e-2 in half precision. Integers must be
    equal.

    For interatomic potentials use `torchcall.mliap.compile`, which derives the gradients.

    Args:
        module: an eager module. Its arguments and results are pytrees of tensors. It is not
            changed: a copy in eval mode is compiled, with its weights as constants.
        path: the file to write; its name ends in `.pt2`. An existing file is replaced atomically.
        example: the positional arguments, a tuple of pytrees of arrays (JAX, NumPy or torch). The
            package takes their dtypes. JAX arrays are int64 only with x64; the others need no x64.
        dynamic: "auto": axes of two or more entries may have any size if the module allows it; the
            others keep the example's sizes. True: an error if all axes are fixed. False: all axes
            are fixed. With TORCHCALL_PROGRESS=1, fixed axes are reported. A module that calls
            `torch.autograd.grad` inside its forward is compiled for fixed sizes.
        device: "cpu" or "cuda".
        cache: whether to reuse packages from, and store them in, `$TORCHCALL_CACHE`, by default
            `torchcall/packages` in the user's cache folder (`~/.cache` on Linux). The key covers
            the operators, the weights, the options, torch and the machine.
        gradients: with respect to which arguments `jax.grad`, `vjp`, `value_and_grad` and `jacrev`
            can differentiate a call of the package, once. True: all arrays of floats. A position in
            `example`, or several: the arrays of floats there. The package then has a second
            program, so that it takes twice as long to compile. It is compared with the module's
            gradients by autograd.
        parallel: whether the package's own loops are divided among torch's threads, on a CPU. They
            are serial by default, because sums into rows (`index_add`) are atomic in parallel
            loops. Matrix products are torch's and use its threads in any case.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        OSError: the file cannot be written.
        CompileError: the module cannot be compiled; the message names the operation.
    """
    # Imported here: torch's compiler takes seconds to import.
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
        gradients=gradients,
        parallel=parallel,
    )
