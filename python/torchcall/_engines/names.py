"""What errors and reports call a model of this process."""

from typing import Any

import torch

from torchcall._undocumented.of_torch import uncompiled


def name_of(model: Any) -> str:
    """The model's attribute `display_name`, or the name of its class or function."""
    if isinstance(model, torch.jit.ScriptFunction):
        return str(model.name)
    model = uncompiled(model)
    if not isinstance(model, torch.nn.Module):
        return str(getattr(model, "__name__", type(model).__name__))
    declared = getattr(model, "display_name", None)
    if isinstance(declared, str):
        return declared
    return str(getattr(model, "original_name", type(model).__name__))
