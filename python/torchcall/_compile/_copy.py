"""Copies a module for inference, without changing it."""

import copy
from typing import Any

import torch

from torchcall._compile._errors import CompileError, message_of
from torchcall._undocumented.of_torch import (
    BUFFERS,
    MODULES,
    PARAMETERS,
    Dropout,
    NormBase,
    uncompiled,
)


def copy_of(
    module: object, name: str, dtype: torch.dtype | None, device: torch.device
) -> torch.nn.Module:
    """A copy in eval mode whose weights do not require gradients.

    Does not use `copy.deepcopy`, which converts modules of e3nn to TorchScript.

    Args:
        module: what the caller passed.
        name: the name of its class.
        dtype: the dtype of the copy's weights and buffers; None: unchanged.
        device: the device of the copy.

    Raises:
        TypeError: it is not an eager module.
        CompileError: it cannot be copied.
    """
    module = uncompiled(module)
    expected = "torchcall: compile: module: expected an eager torch.nn.Module"
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{expected}, got a torch.jit.ScriptModule, which torch cannot export; pass the module "
            "that it was scripted from, or use it uncompiled with TorchMliap.from_module"
        )
    if not isinstance(module, torch.nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else name
        raise TypeError(f"{expected}, got {got}")
    try:
        copied = inference_copy(module)
    except Exception as error:
        raise CompileError(
            f"torchcall: {name}: compile: expected a module that can be copied, got an "
            f"error\n{message_of(error)}"
        ) from error
    return copied.to(device=device) if dtype is None else copied.to(device=device, dtype=dtype)


def inference_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of any module in eval mode, with weights that do not require gradients."""
    copied = _copied(module, {}).eval()
    for weight in copied.parameters():  # script modules have no `requires_grad_`
        weight.requires_grad_(False)
    return copied


def training_note(module: object) -> str:
    """Names the part that `training_part` finds, for a report on compilation; empty if none."""
    part = training_part(module)
    return part and f"{part} is in training mode; the copy that is compiled is in eval mode"


def training_part(module: object) -> str:
    """The name and class of the first part whose results training mode changes; empty if none.

    A part of another kind, such as a new module around one in eval mode, computes the same.
    """
    for name, part in module.named_modules() if isinstance(module, torch.nn.Module) else ():
        if isinstance(part, torch.jit.ScriptModule):
            kind: Any = getattr(torch.nn, part.original_name, None)
        else:
            kind = type(part)
        # A frozen module has no mode.
        is_training = getattr(part, "training", False)
        if is_training and isinstance(kind, type) and issubclass(kind, _CHANGED_BY_TRAINING):
            return f"{name} ({kind.__name__})" if name else kind.__name__
    return ""


_CHANGED_BY_TRAINING = (Dropout, NormBase, torch.nn.RNNBase, torch.nn.MultiheadAttention)


def scripted_parts(module: torch.nn.Module) -> list[str]:
    """Names of the outermost TorchScript submodules."""
    found: list[str] = []
    for name, part in module.named_modules():
        inside = any(name.startswith(f"{other}.") for other in found)
        if isinstance(part, torch.jit.ScriptModule) and not inside:
            found.append(name)
    return found


def _copied(module: torch.nn.Module, memo: dict[int, Any]) -> torch.nn.Module:
    if id(module) in memo:
        return memo[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        with torch.no_grad():  # otherwise the copied parameters would not be leaves
            memo[id(module)] = copy.deepcopy(module)
        return memo[id(module)]
    result: torch.nn.Module = object.__new__(type(module))
    memo[id(module)] = result
    state = vars(module).copy()
    fields: dict[str, Any] = vars(result)
    # Submodules first: attributes may refer to them.
    fields[MODULES] = {
        name: None if part is None else _copied(part, memo)
        for name, part in state.pop(MODULES).items()
    }
    for group in (PARAMETERS, BUFFERS):
        tensors = state.pop(group)
        fields[group] = {name: _tensor(tensor, memo) for name, tensor in tensors.items()}
    for name, value in state.items():
        fields[name] = _attribute(value, memo)
    return result


def _tensor(tensor: torch.Tensor | None, memo: dict[int, Any]) -> torch.Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in memo:
        value = tensor.detach().clone()
        parameter = isinstance(tensor, torch.nn.Parameter)
        memo[id(tensor)] = torch.nn.Parameter(value, requires_grad=False) if parameter else value
    return memo[id(tensor)]


def _attribute(value: Any, memo: dict[int, Any]) -> Any:
    if isinstance(value, torch.Tensor):
        return _tensor(value, memo)
    if isinstance(value, torch.fx.Graph):  # a GraphModule runs code generated from its graph
        return value
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # locks, open files, …: shared with the original
        return value
