"""Which model a run used: a digest of its weights, for checkpoints."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

import torchcall
from torchcall import TorchModuleWrapper
from torchcall._call.content import content_of


def weights_record(wrapper: TorchModuleWrapper) -> dict[str, str]:
    """A digest of the model, and the versions with which digests can be compared.

    The digest is that of a package's operators and weights, of a file's content, or of a live
    module's parameters and buffers; "" for a module without them.
    """
    versions = {"torchcall": torchcall.__version__, "torch": torch.__version__}
    return {"digest": _digest(wrapper), "engine": wrapper._source.engine, **versions}


def is_other(now: dict[str, str], before: dict[str, str] | None) -> bool:
    """Whether the weights differ. False if the digests are of other versions or engines.

    These may name or store the same weights differently.
    """
    if before is None or not (now["digest"] and before["digest"]):
        return False
    return now["digest"] != before["digest"] and {**now, "digest": before["digest"]} == before


def _digest(wrapper: TorchModuleWrapper) -> str:
    source: Any = wrapper._source
    if source.engine == "AOTInductor" and source.metadata.torchcall is not None:
        return str(source.metadata.torchcall["content"])
    if content := content_of(wrapper._model):
        return content
    module = wrapper._inspected()
    state = module.state_dict() if isinstance(module, torch.nn.Module) else {}
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, torch.Tensor):  # not extra state
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if state else ""
