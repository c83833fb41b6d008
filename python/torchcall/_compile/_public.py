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
    example: Any,
    cutoff: float,
    dtype: Any = None,
    device: str | torch.device = "cpu",
    dynamic: Literal["auto"] | bool = "auto",
    cache: bool = True,
) -> Path:
    """Makes an AOTInductor package that returns energies and their gradients.

    The package serves any numbers of atoms, edges and systems from 2 on, if the module allows it.
    Otherwise its shapes are those of the padded example, which it records as its capacity.

    It is written only after its results have been compared with the module's own on several shapes
    and structures: to 1e-10 of the largest number of their kind in float64, 1e-4 in float32.

    Args:
        module: an eager module that takes an `AtomGraphInput` of tensors and returns energies (B,)
            in eV, alone or in a dict under 'energy'; or, if it differentiates inside, a dict with
            'position_gradients' (N, 3), ∂E/∂r, and, where it has them, 'cell_gradients' (B, 3, 3),
            ∂E/∂h. It stays as it is: a copy is compiled, in eval mode, its weights constants.
        path: where to write, a name that ends in `.pt2`. What is there already is replaced at the
            end, in one step.
        example: a `torchcall.mliap.AtomGraph`, or an `AtomGraphInput` of arrays of any library,
            phantoms included. Only a static package depends on its sizes.
        cutoff: in Å, recorded for `TorchMliap.from_package`.
        dtype: float32 or float64, of inputs and outputs, to which weights and buffers are cast too;
            None: that of the example's positions, and weights stay as they are.
        device: "cpu" or "cuda".
        dynamic: "auto": any shapes where that is possible; True: else an error; False: the padded
            example's shapes only.
        cache: whether to look for, and keep, the package in `$TORCHCALL_CACHE`, by default
            `~/.cache/torchcall/packages`. Its key is made of the traced operators, the weights, the
            options, torch and the machine.

    Returns:
        The path.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it.
        OSError: the path cannot be written.
        RuntimeError: the module cannot be compiled; the message says which operation stands in the
            way, and what still works.
    """
    # torch's compiler takes seconds to import: only who compiles waits for it.
    from torchcall._compile._progress import Progress
    from torchcall._compile._run import run

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
    )
