"""`torchcall.mliap.compile`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch


def compile(
    module: torch.nn.Module,
    path: str | Path,
    *,
    example: Any,
    cutoff: float | None = None,
    dtype: Any = None,
    device: str | torch.device = "cpu",
    dynamic: Literal["auto"] | bool = "auto",
    cache: bool = True,
    second_derivatives: bool = False,
    parallel: bool = False,
) -> Path:
    """Compiles a potential into an AOTInductor package that returns energies and gradients.

    The package serves any numbers of atoms, edges and systems of at least 2, if the module allows
    it. Otherwise its shapes are those of the padded example, which it records as its capacity.

    Before the package is written, its results are compared with the module's on several shapes and
    structures, to 1e-10 of the largest value of the output in float64, and 1e-4 in float32.

    This takes from half a minute to several minutes. The stages are reported on stderr if that is a
    terminal, or with TORCHCALL_PROGRESS=1 in the environment; elsewhere nothing is printed.

    Args:
        module: an eager module that takes an `AtomGraphInput` of tensors and returns energies (B,)
            in eV, alone or in a dict under 'energy'; or, if it differentiates inside, a dict with
            'position_gradients' (N, 3), ∂E/∂r, and optionally 'cell_gradients' (B, 3, 3), ∂E/∂h.
            The module is not changed: a copy is compiled, in eval mode, with constant weights.
        path: output file, a name that ends in `.pt2`. An existing file is replaced atomically at
            the end.
        example: a `torchcall.mliap.AtomGraph`, or an `AtomGraphInput` of arrays of any library,
            phantoms included. Only a package for fixed shapes depends on its sizes.
        cutoff: in Å, recorded for `TorchMliap.from_package`; None: the module's attribute `cutoff`.
        dtype: float32 or float64, for inputs, outputs, weights and buffers. None: inputs and
            outputs have the dtype of the example's positions; weights are not cast.
        device: "cpu" or "cuda".
        dynamic: "auto": any shapes if possible, else those of the padded example. True: any
            shapes, or an error. False: the padded example's shapes only.
        cache: whether to reuse packages from, and store them in, `$TORCHCALL_CACHE`, by default
            `torchcall/packages` in the user's cache folder (`~/.cache` on Linux). The key covers
            the traced operators, the weights, the options, torch and the machine.
        second_derivatives: whether the package also has the derivatives of its gradients, for
            `jax.hessian(energy)` and `jax.jvp(jax.grad(energy), …)`. It then takes about three
            times as long to compile. A module that differentiates inside must do so with
            `create_graph=True` and not detach.
        parallel: see `torchcall.compile`.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        OSError: the path cannot be written.
        CompileError: the module cannot be compiled; the message names the operation and
            alternatives.
    """
    # torch's compiler takes seconds to import: import it only for compilation.
    from torchcall._compile._progress import Progress
    from torchcall.mliap._compile._run import run

    return run(
        module,
        path,
        example=example,
        cutoff=cutoff,
        dtype=dtype,
        device=device,
        dynamic=dynamic,
        cache=cache,
        progress=Progress(),
        second_derivatives=second_derivatives,
        parallel=parallel,
    )
