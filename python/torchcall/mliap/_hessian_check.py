"""Whether torch's derivatives of a potential's gradients are right: finite differences on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from torchcall._compile._copy import inference_copy
from torchcall._undocumented.of_torch import optimized_execution
from torchcall._wrapper import TorchModuleWrapper
from torchcall.mliap._compile._small import small_example
from torchcall.mliap._energy_torch import weights_dtype
from torchcall.mliap._species import wrapped_species

Arrays = tuple[torch.Tensor, ...]
_STEPS = {torch.float32: (1e-2, 3e-3), torch.float64: (1e-3, 1e-5)}  # Å


def wrong_products(wrapper: TorchModuleWrapper, cutoff: float, cells: bool) -> str:
    """Compares `vᵀ H` of torch with a central difference of the gradients along v.

    On a small structure, in eval mode. torch does not notice every backward that it cannot
    differentiate: one in C++, or one that detaches, gives products that lack a part. These differ
    along every vector and for every step. Gradients with kinks, as of a ReLU, differ where a step
    crosses one, so a second vector with shorter steps decides, and then float64.

    Args:
        wrapper: an eager or TorchScript module.
        cutoff: in Å.
        cells: whether cell gradients are used.

    Returns:
        What is wrong, empty if nothing is or if the module cannot be called on the structure.
    """
    try:
        module = inference_copy(wrapper._inspected()).cpu()
        own = weights_dtype(module) or torch.float64
        species = wrapped_species(wrapper)
    except Exception:  # of any kind: modules are not copied elsewhere
        return ""
    keys = ("pos", "cell") if cells else ("pos",)
    found = ""
    with (
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        torch.device("cpu"),
        optimized_execution(False),
    ):
        for dtype in dict.fromkeys((own, torch.float64)):
            for seed, step in enumerate(_STEPS.get(dtype, ())):
                try:
                    if dtype != own:
                        module.to(dtype=dtype)
                    graph = small_example(cutoff, species, dtype)
                    wrong = _wrong(module, graph, keys, step, seed)
                except Exception:  # the call itself reports it
                    return found
                if not wrong:
                    return ""
                found = found or wrong
    return found


def _wrong(
    module: Callable[..., dict[str, torch.Tensor]],
    graph: dict[str, torch.Tensor],
    keys: tuple[str, ...],
    step: float,
    seed: int,
) -> str:
    """What is wrong with the product along one vector, empty if nothing is."""
    x = tuple(graph[key] for key in keys)
    eps = torch.finfo(x[0].dtype).eps

    def gradients(*moved: torch.Tensor) -> Arrays:
        out = module(graph | dict(zip(keys, moved, strict=True)))
        return tuple(out[key] for key in ("position_gradients", "cell_gradients")[: len(keys)])

    v = _direction(graph, keys, seed)
    differences = [_difference(gradients, x, v, step / n) for n in (1, 2)]
    leaves = [value.clone().requires_grad_(True) for value in x]
    found = gradients(*(leaf.clone() for leaf in leaves))
    try:
        product = _product(found, leaves, v)
    except Exception as error:
        return (
            "expected gradients that torch can differentiate, got an error of torch on a "
            f"small structure: {error}"
        )
    for name, part, coarse, fine, gradient in zip(keys, product, *differences, found, strict=True):
        exact = (4 * fine - coarse) / 3
        error = (part - exact).abs().max().item()
        scale = max(part.abs().max().item(), exact.abs().max().item())
        rounding = eps * gradient.abs().max().item() / step
        # NaN is not larger.
        if error > 0.01 * scale + 4 * (fine - coarse).abs().max().item() + 100 * rounding:
            return (
                f"expected gradients by {name!r} whose derivatives torch computes, got products "
                f"that differ by {error / scale:.0%} from finite differences, on a small "
                "structure: torch does not differentiate a backward in the module, or a part is "
                "detached, or the gradients are not those of one energy; use finite differences"
            )
    return ""


def _direction(graph: dict[str, torch.Tensor], keys: tuple[str, ...], seed: int) -> Arrays:
    """A random one, of atoms that are no phantoms and of cells that are periodic."""
    random = np.random.default_rng(seed)
    real = {"pos": graph["batch"] < len(graph["cell"]) - 1, "cell": graph["pbc"].all(1)}
    real["cell"][-1] = False
    moves = [torch.from_numpy(random.normal(size=graph[key].shape)) for key in keys]
    return tuple(
        (move * real[key].reshape(-1, *[1] * (move.ndim - 1))).to(graph[key].dtype)
        for key, move in zip(keys, moves, strict=True)
    )


def _difference(gradients: Callable[..., Arrays], x: Arrays, v: Arrays, step: float) -> Arrays:
    ends = [
        gradients(*(a + sign * step * b for a, b in zip(x, v, strict=True))) for sign in (1, -1)
    ]
    return tuple((a - b).detach() / (2 * step) for a, b in zip(*ends, strict=True))


def _product(found: Arrays, leaves: list[torch.Tensor], v: Arrays) -> Arrays:
    attached = [k for k, gradient in enumerate(found) if gradient.requires_grad]
    if not attached:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    outputs, cotangents = [found[k] for k in attached], [v[k] for k in attached]
    parts = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)
    return tuple(
        torch.zeros_like(leaf) if part is None else part.detach()
        for part, leaf in zip(parts, leaves, strict=True)
    )
