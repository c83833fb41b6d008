"""The form of a potential's outputs: keys, shapes and kinds of dtypes, with advice in errors."""

from collections.abc import Mapping
from typing import Any

import torch

from torchcall._undocumented.of_torch import (
    TorchDispatchMode,
    address,
    current_graph_task_id,
    tree_leaves,
)

_DERIVE = "; if the module returns energies only, TorchMliap.from_energy differentiates them"
_SUM = (
    "sum over the atoms of each system: zeros(B).index_add(0, input['batch'], per_atom), with "
    "B = input['cell'].size(0)"
)


def check_outputs(name: str, out: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks what a `TorchMliapForward` module returns.

    Args:
        name: what errors call the module.
        out: the result; its leaves have `shape` and `dtype`, of torch, NumPy or JAX.
        shapes: the expected shape of each key. Other keys are ignored.

    Raises:
        TypeError: the result or an output has another type.
        ValueError: a key is missing, or a shape is wrong.
    """
    if not isinstance(out, Mapping):
        raise TypeError(
            f"torchcall: {name}: output: expected a dict with 'energy' and 'position_gradients', "
            f"got {_kind(out)}{_DERIVE}"
        )
    for key, shape in shapes.items():
        if key not in out:
            raise ValueError(
                f"torchcall: {name}: output ['{key}']: expected this key, got "
                f"{sorted(map(str, out))}{_advice_for_missing(key, set(map(str, out)))}"
            )
        n_atoms = shapes.get("position_gradients", (-1,))[0]
        _check_output(name, key, out[key], shape, n_atoms)


def checked_energy(name: str, out: Any, *, n_atoms: int, n_systems: int) -> Any:
    """The energies in what a module returns: an array, or the entry `energy` of a dict.

    Raises:
        TypeError, ValueError: it does not contain one energy for each system.
    """
    if isinstance(out, Mapping) and "energy" not in out:
        raise ValueError(
            f"torchcall: {name}: output ['energy']: expected this key, got {sorted(map(str, out))}"
        )
    energy = out["energy"] if isinstance(out, Mapping) else out
    _check_output(name, "energy", energy, (n_systems,), n_atoms)
    return energy


def check_attached(name: str, energy: torch.Tensor, followed: "Followed") -> None:
    """Checks that autograd can differentiate an energy that depends on positions or cells.

    Raises:
        ValueError: it cannot.
    """
    if not energy.requires_grad and followed.reached(energy):
        raise ValueError(
            f"torchcall: {name}: output ['energy']: expected an energy that autograd can "
            "differentiate by 'pos', got a detached one; remove no_grad() and detach(), or return "
            "'position_gradients' too if the module differentiates inside"
        )


class Followed(TorchDispatchMode):
    """While active, records which tensors are computed from some others, detached or not.

    Memory is recorded, not tensors, so that writes through views count. It is not released before
    the end, so that no new tensor can have a recorded address.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__()
        self._alive = [tensor.untyped_storage() for tensor in tensors]
        self._reached = {address(storage) for storage in self._alive}

    def reached(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed from them."""
        return address(tensor.untyped_storage()) in self._reached

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(self.reached(tensor) for tensor in _tensors((args, kwargs))):
            for tensor in _tensors(result):
                storage = tensor.untyped_storage()
                self._alive.append(storage)
                self._reached.add(address(storage))
        return result


class WithoutGraph(Followed):
    """`Followed`; also records what is computed from gradients without a graph of their own.

    These are the results of `torch.autograd.grad` without create_graph that depend on the tensors.
    """

    def __init__(self, *tensors: torch.Tensor) -> None:
        super().__init__(*tensors)
        self._cut: set[int] = set()

    def is_cut(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was computed from such gradients."""
        return address(tensor.untyped_storage()) in self._cut

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        in_backward = current_graph_task_id() != -1 and not torch.is_grad_enabled()
        given = _tensors((args, kwargs))
        if any(self.is_cut(x) for x in given) or (in_backward and any(map(self.reached, given))):
            # Shapes and masks have no derivatives.
            found = [x for x in _tensors(result) if x.is_floating_point() or x.is_complex()]
            self._cut |= {address(x.untyped_storage()) for x in found}
        return result


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _check_output(name: str, key: str, value: Any, shape: tuple[int, ...], n_atoms: int) -> None:
    where = f"torchcall: {name}: output ['{key}']"
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{where}: expected a tensor, got {_kind(value)}")
    found = tuple(value.shape)
    if found != shape:
        advice = _advice_for_shape(found, shape[0], n_atoms) if key == "energy" else ""
        raise ValueError(f"{where}: expected shape {shape}, got {found}{advice}")
    dtype = str(value.dtype).removeprefix("torch.")
    if "float" not in dtype:
        raise TypeError(f"{where}: expected floats, got {dtype}")


def _advice_for_missing(key: str, keys: set[str]) -> str:
    if key == "position_gradients":
        if "forces" in keys:
            return "; gradients are the negative of forces: return 'position_gradients' = -forces"
        return _DERIVE
    found = sorted(keys & {"virial", "virials", "stress"})
    if key == "cell_gradients" and found:
        return (
            f"; torchcall.mliap.lattice_gradient_from_virial converts the {found[0]}, times the "
            "volume if it is a stress, with the sign of dE/dstrain"
        )
    if key == "cell_gradients":
        return "; return ∂E/∂h, or leave out compute_cell_gradients"
    return ""


def _advice_for_shape(found: tuple[int, ...], n_systems: int, n_atoms: int) -> str:
    if found == (n_systems, 1):
        return "; remove the last axis: energy.squeeze(-1)"
    if found == ():
        return f"; this is one sum over the batch: {_SUM}"
    return f"; this is an energy per atom: {_SUM}" if found[0] == n_atoms else ""


def _kind(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"an array of shape {tuple(value.shape)}"
    return "None" if value is None else type(value).__name__
