"""Trained networks as potentials: `load(name_or_path_or_module)`.

One module per network, each with its own `load`. A network's package is imported when it is used.
"""

from torchcall import _loaded as _loaded  # first: reports what is missing
from torchcall.models import chgnet, mace, nequip, own, sevennet
from torchcall.models._load import load

__all__ = ["chgnet", "load", "mace", "nequip", "own", "sevennet"]
