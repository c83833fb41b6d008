"""NequIP and Allegro, https://github.com/mir-group/nequip: checkpoints, packages and modules.

S. Batzner et al., Nat. Commun. 13, 2453 (2022); A. Musaelian et al., Nat. Commun. 14, 579 (2023).
See docs/networks/nequip.md.
"""

# pyright: reportMissingImports=false
# nequip and e3nn are optional.

import contextlib
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from torchcall._compile._copy import inference_copy
from torchcall._undocumented.of_torch import compiler_settings
from torchcall.mliap import TorchMliap, edge_vectors
from torchcall.mliap._compile._example import checked_dtype
from torchcall.models import _common

NAMES: tuple[str, ...] = ()
"""nequip's package contains no trained models."""

DISTRIBUTIONS: tuple[str, ...] = ("nequip", "nequip-allegro", "e3nn")

_PACKAGE = ".nequip.zip"
_COMPILED = (".nequip.pth", ".nequip.pt2")
_INPUTS = {"pos", "edge_index", "edge_vectors", "edge_cell_shift", "cell", "batch", "atom_types"}
_INPUTS |= {"num_atoms", "edge_transpose_perm", "lmp_mliap_data", "num_local_ghost_atoms"}


class NequipEnergy(torch.nn.Module):
    """Energies of a NequIP or Allegro model.

    Their edge vectors are those of torchcall, `pos[edge_index[1]] − pos[edge_index[0]]` plus the
    shift. Edges beyond the cutoff of a pair of types have no weight in the model.

    Args:
        network: maps nequip's data to the same with `atomic_energy`, without derivatives.
        index: (120,) the model's type of each atomic number, −1 where it has none.
        cutoff: in Å.
    """

    index: torch.Tensor
    species: list[int]

    def __init__(self, network: torch.nn.Module, index: torch.Tensor, cutoff: float) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("index", index)
        self.cutoff = cutoff
        self.species = [int(number) for number in (index >= 0).nonzero().flatten()]

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        """Energy of each system, `(B,)` in eV."""
        data = {
            "pos": input["pos"],
            "edge_index": input["edge_index"],
            "edge_vectors": edge_vectors(input),
            "atom_types": self.index.index_select(0, input["atomic_numbers"]),
        }
        per_atom = self.network(data)["atomic_energy"].squeeze(1)
        total = torch.zeros(input["cell"].size(0), dtype=per_atom.dtype, device=per_atom.device)
        return total.index_add(0, input["batch"], per_atom)


def recognises(source: object) -> bool:
    """Whether a source is a package, a checkpoint, a compiled model or a module of nequip."""
    if _is_graph_model(source) or _common.is_file(source, _PACKAGE, *_COMPILED):
        return True
    if not _common.is_file(source, ".ckpt"):
        return False
    # The configuration in a checkpoint names classes of nequip.
    return any(text.startswith("nequip.") for text in _common.pickled_strings(str(source)))


@_common.one_at_a_time
def load(
    source: str | Path | torch.nn.Module,
    *,
    model_name: str = "sole_model",
    species: Mapping[str, str] | None = None,
    dtype: Any = None,
    engine: Literal["auto", "eager", "script", "package"] = "auto",
    device: Any = None,
    verbose: bool = True,
    **options: Any,
) -> TorchMliap:
    """Loads a NequIP or Allegro model.

    Checkpoints and packages contain pickles and code, which run when they are loaded, as in nequip
    itself. Load only files from sources that you trust.

    Args:
        source: a package (`.nequip.zip`), a checkpoint (`.ckpt`), or nequip's `GraphModel`.
        model_name: key of the model in a file with several.
        species: chemical symbol of each element and the model's name of its type, e.g.
            `{"Si": "silicon"}`. None: the model's types are named by chemical symbols.
        dtype, engine, device, verbose: see `torchcall.models.load`. The dtype of a model is fixed
            when it is trained (`model_dtype`).
        **options: options of `TorchModuleWrapper`, and `example`, see `TorchMliap.from_energy`.

    Raises:
        ValueError: an option is wrong, or the source is a compiled model.
        FileNotFoundError: the file does not exist.
        ImportError: nequip is missing, or allegro for an Allegro model.
    """
    title = type(source).__name__ if isinstance(source, torch.nn.Module) else str(source)
    if not isinstance(source, torch.nn.Module):
        if not Path(source).is_file():
            raise FileNotFoundError(f"torchcall: NequIP: expected a file, got {title!r}")
        if title.endswith(_COMPILED):
            raise ValueError(
                f"torchcall: {title}: expected a checkpoint or a package ({_PACKAGE}), got a model "
                "compiled by nequip, which evaluates one system per call; load the file that it "
                "was compiled from"
            )
    with _contained():
        _common.require("nequip", "nequip")
        jit = _common.require("e3nn.util.jit", "nequip")
        network = source if isinstance(source, torch.nn.Module) else _read(title, model_name)
        module = _energy(network, species)
        _check_dtype(network, dtype)
        return _common.build(
            module,
            title=f"NequIP: {title}",
            dtype=None,  # a cast would round constants that nequip holds in float64
            engine=engine,
            device=device,
            script=jit.script,
            verbose=verbose,
            **options,
        )


def _read(path: str, model_name: str) -> torch.nn.Module:
    from nequip.model import saved_models
    from nequip.utils.global_state import set_global_state

    set_global_state()
    load_saved_model: Any = saved_models.load_saved_model
    models = load_saved_model(path, model_key=None)  # all models of the file
    if model_name not in models:
        raise ValueError(
            f"torchcall: {path}: model_name: expected one of {', '.join(map(repr, models))}, got "
            f"{model_name!r}"
        )
    return models[model_name]


def _energy(network: Any, species: Mapping[str, str] | None) -> NequipEnergy:
    from ase.data import atomic_numbers

    if not _is_graph_model(network):
        raise TypeError(
            "torchcall: NequIP: expected a GraphModel, nequip's whole model, got "
            f"{type(network).__name__}"
        )
    others = sorted(set(network.model_input_fields) - _INPUTS)
    if others:
        raise ValueError(
            f"torchcall: NequIP: expected a model of positions and elements, got one with other "
            f"inputs: {', '.join(others)}"
        )
    types: list[str] = network.metadata["type_names"].split(" ")
    named = {name: name for name in types} if species is None else species
    if not isinstance(named, Mapping) or not named:
        raise TypeError(
            "torchcall: NequIP: species: expected a dict of chemical symbols and, for each, one of "
            f"the model's types {', '.join(types)}, got {named!r}"
        )
    index = torch.full((120,), -1, dtype=torch.int64)
    for symbol, name in named.items():
        if symbol not in atomic_numbers or name not in types:
            raise ValueError(
                "torchcall: NequIP: species: expected chemical symbols and, for each, one of the "
                f"model's types {', '.join(types)}, got {symbol!r}: {name!r}; pass "
                "species={symbol: type}"
            )
        index[atomic_numbers[symbol]] = types.index(name)
    copied: Any = inference_copy(network)
    # The outermost part differentiates.
    inner = copied.model.func if hasattr(copied.model, "do_derivatives") else copied.model
    return NequipEnergy(inner, index, float(network.metadata["r_max"]))


def _check_dtype(network: Any, dtype: Any) -> None:
    own = network.metadata["model_dtype"]
    if dtype is not None:
        wanted = str(checked_dtype(dtype, "torchcall: NequIP")).removeprefix("torch.")
        if wanted != own:
            raise ValueError(
                f"torchcall: NequIP: dtype: expected None or {own}, the `model_dtype` that the "
                f"model was trained with, got {wanted}"
            )


def _is_graph_model(source: object) -> bool:
    """Whether a source is a `GraphModel`, also one whose class comes out of a package."""
    return isinstance(source, torch.nn.Module) and bool(getattr(source, "is_graph_model", False))


@contextlib.contextmanager
def _contained() -> Iterator[None]:
    """Hides nequip's warnings and undoes the global settings that `set_global_state` changes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.ExitStack() as stack:
            _save(stack)
            yield


def _save(stack: contextlib.ExitStack) -> None:
    """Registers what restores the process's state."""
    e3nn = _common.require("e3nn", "nequip")
    _common.require("nequip", "nequip")
    state = _common.require("nequip.utils.global_state", "nequip")
    stack.callback(torch.set_default_dtype, torch.get_default_dtype())
    stack.callback(random.setstate, random.getstate())
    stack.callback(np.random.set_state, np.random.get_state())
    stack.callback(torch.set_rng_state, torch.get_rng_state())
    strategy = torch.jit.set_fusion_strategy(state._JIT_FUSION_STRATEGY)
    stack.callback(torch.jit.set_fusion_strategy, strategy)
    stack.callback(e3nn.set_optimization_defaults, **e3nn.get_optimization_defaults())
    sharing = torch.multiprocessing
    stack.callback(sharing.set_sharing_strategy, sharing.get_sharing_strategy())
    stack.callback(setattr, state, "_GLOBAL_STATE_INITIALIZED", state._GLOBAL_STATE_INITIALIZED)
    settings = compiler_settings()
    for name in ("capture_dynamic_output_shape_ops", "capture_scalar_outputs"):
        stack.callback(setattr, settings, name, getattr(settings, name))
    if torch.cuda.is_available():
        backends: Any = torch.backends
        stack.callback(setattr, backends, "fp32_precision", backends.fp32_precision)
    before = dict(os.environ)
    for name in ("PYTORCH_JIT_USE_NNC_NOT_NVFUSER", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        stack.callback(_set_environment, name, before.get(name))


def _set_environment(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
