"""SevenNet, https://github.com/MDIL-SNU/SevenNet: checkpoints and deployed models of `sevenn`.

Y. Park et al., J. Chem. Theory Comput. 20, 4857 (2024). See docs/networks/sevennet.md.
"""

# pyright: reportMissingImports=false
# sevenn and e3nn are optional.

import contextlib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from torchcall._compile._copy import inference_copy
from torchcall.mliap import TorchMliap, edge_vectors
from torchcall.models import _common

_IN_PACKAGE = {
    "7net-0": "SEVENNET_0_11Jul2024",
    "7net-0_11jul2024": "SEVENNET_0_11Jul2024",
    "7net-0_22may2024": "SEVENNET_0_22May2024",
    "7net-l3i5": "SEVENNET_l3i5",
    "7net-mf-0": "SEVENNET_MF_0",
}
_DOWNLOADED = {
    "7net-mf-ompa": "SEVENNET_MF_ompa",
    "7net-omat": "SEVENNET_omat",
    "7net-omni": "SEVENNET_omni",
    "7net-omni-i8": "SEVENNET_omni_i8",
    "7net-omni-i12": "SEVENNET_omni_i12",
}
_FILES = _IN_PACKAGE | _DOWNLOADED
NAMES: tuple[str, ...] = tuple(_FILES)
"""Pretrained models. The first five are in the package `sevenn`; it downloads the others."""

DISTRIBUTIONS: tuple[str, ...] = ("sevenn", "e3nn")

# Layers that use energies or differentiate them; torchcall does both.
_DROPPED = ("reduce_total_enegy", "force_output", "edge_preprocess")
_SYMBOLS = "chemical_symbols_to_index"


class SevenNetEnergy(torch.nn.Module):
    """Energies of a SevenNet.

    SevenNet's edge vectors are those of torchcall, `pos[edge_index[1]] − pos[edge_index[0]]` plus
    the shift; its messages go from `edge_index[1]` to `edge_index[0]`.

    Args:
        layers: maps SevenNet's data to the same with atomic energies, layer by layer.
        index: (120,) SevenNet's index of each atomic number, −1 for those that it does not know.
        cutoff: in Å.
        modal: index of the modality of a model with several; −1 for other models.
        dtype: of the weights.
    """

    index: torch.Tensor
    modal: torch.Tensor
    species: list[int]

    def __init__(
        self,
        layers: list[torch.nn.Module],
        index: torch.Tensor,
        cutoff: float,
        modal: int = -1,
    ) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.register_buffer("index", index)
        self.register_buffer("modal", torch.tensor(max(modal, 0)))
        self.has_modal = modal >= 0
        self.cutoff = cutoff
        self.species = [int(number) for number in (index >= 0).nonzero().flatten()]

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        """Energy of each system, `(B,)` in eV."""
        vectors, numbers = edge_vectors(input), input["atomic_numbers"]
        # SevenNet's cutoff functions are zero at the cutoff and grow beyond it, where the phantoms'
        # edges end: these are shortened. Others are multiplied by 1.
        square = vectors.square().sum(1, keepdim=True)
        vectors = vectors * (self.cutoff**2 / square).clamp(max=1.0).sqrt()
        data = {
            "x": self.index.index_select(0, numbers),
            "edge_index": input["edge_index"],
            "edge_vec": vectors,
            "num_atoms": torch.ones_like(numbers).sum(),
        }
        if self.has_modal:
            data["modal_type"] = self.modal
        for layer in self.layers:
            data = layer(data)
            # SevenNet's one-hot rows are float32 whatever the dtype of the weights.
            for key in ("x", "node_attr", "modal_attr"):
                if key in data and data[key].is_floating_point():
                    data[key] = data[key].to(vectors.dtype)
        per_atom = data["atomic_energy"].squeeze(1)
        total = torch.zeros(input["cell"].size(0), dtype=per_atom.dtype, device=per_atom.device)
        return total.index_add(0, input["batch"], per_atom)


def recognises(source: object) -> bool:
    """Whether a source is a name, a checkpoint, a deployed model or a module of SevenNet."""
    if isinstance(source, str) and _short(source) in NAMES:
        return True
    if not _common.is_file(source):
        return _common.is_module_of(source, "sevenn")
    assert isinstance(source, str | Path)
    return _is_deployed(source) or _is_checkpoint(source)


@_common.one_at_a_time
def load(
    source: str | Path | torch.nn.Module,
    *,
    modal: str | None = None,
    dtype: Any = None,
    engine: Literal["auto", "eager", "script", "package"] = "auto",
    device: Any = None,
    verbose: bool = True,
    **options: Any,
) -> TorchMliap:
    """Loads a SevenNet.

    A checkpoint is a pickle: loading it runs code that it contains, as SevenNet itself does. Load
    only files from sources that you trust.

    Args:
        source: a name in `NAMES`; a checkpoint (`.pth`); a model deployed for LAMMPS
            (`deployed_serial.pt`); or SevenNet's module in memory.
        modal: the modality of a model with several, e.g. "PBE" of 7net-mf-0.
        dtype, engine, device, verbose: see `torchcall.models.load`. Deployed models are TorchScript
            and cannot be compiled into packages. SevenNet itself has float32 only.
        **options: options of `TorchModuleWrapper`, and `example`, see `TorchMliap.from_energy`.

    Raises:
        ValueError: `modal` is missing, unknown, or not an option of this model.
        FileNotFoundError: the file, or a model that `sevenn` has not downloaded, does not exist.
        ImportError: sevenn is missing.
    """
    if not isinstance(source, torch.nn.Module) and not _common.is_file(source):
        source = str(source)
        if _short(source) not in NAMES:
            raise FileNotFoundError(
                f"torchcall: SevenNet: expected a file or one of {', '.join(NAMES)}, got {source!r}"
            )
    title = type(source).__name__ if isinstance(source, torch.nn.Module) else str(source)
    with _quiet():
        _common.require("sevenn", "sevennet")
        jit = _common.require("e3nn.util.jit", "sevennet")
        module = _deployed(source, modal) if _is_deployed(source) else _energy(source, modal)
    if engine == "package":
        if any(isinstance(layer, torch.jit.ScriptModule) for layer in module.layers):
            raise TypeError(
                "torchcall: SevenNet: engine='package': expected a checkpoint, got a deployed "
                "model, which is TorchScript; load the checkpoint that it was made from"
            )
        tracing: Any = _traceable()
    else:
        tracing = contextlib.nullcontext()
    with tracing, _quiet():
        return _common.build(
            module,
            title=f"SevenNet: {title}" + (f", modal {modal!r}" if modal else ""),
            dtype=dtype,
            engine=engine,
            device=device,
            script=jit.script,
            verbose=verbose,
            **options,
        )


def _energy(source: Any, modal: str | None) -> SevenNetEnergy:
    from sevenn.nn.sequential import AtomGraphSequential

    network: Any = source
    if not isinstance(source, torch.nn.Module):
        from sevenn.util import load_checkpoint

        network = load_checkpoint(str(_path(source))).build_model()
    if not isinstance(network, AtomGraphSequential):
        raise TypeError(
            "torchcall: SevenNet: expected an AtomGraphSequential, SevenNet's whole model, got "
            f"{type(network).__name__}"
        )
    copied: Any = inference_copy(network)  # set_is_batch_data changes it
    number = _modal_index(copied.modal_map or {}, modal)
    copied.set_is_batch_data(False)
    layers = [layer for name, layer in copied.named_children() if name not in _DROPPED]
    index = torch.full((120,), -1, dtype=torch.int64)
    for z, k in copied.type_map.items():
        index[z] = k
    return SevenNetEnergy(layers, index, float(copied.cutoff), number)


def _deployed(source: Any, modal: str | None) -> SevenNetEnergy:
    if modal is not None:
        raise ValueError(
            f"torchcall: SevenNet: modal: expected None for a deployed model, whose modality is "
            f"fixed, got {modal!r}"
        )
    from ase.data import atomic_numbers

    files = {_SYMBOLS: "", "cutoff": ""}
    network = torch.jit.load(str(source), map_location="cpu", _extra_files=files)
    found = {
        key: value.decode() if isinstance(value, bytes) else value for key, value in files.items()
    }
    index = torch.full((120,), -1, dtype=torch.int64)
    for k, symbol in enumerate(found[_SYMBOLS].split()):
        index[atomic_numbers[symbol]] = k
    return SevenNetEnergy([network], index, float(found["cutoff"]))


def _modal_index(modals: dict[str, int], modal: str | None) -> int:
    names = ", ".join(map(repr, modals))
    if not modals and modal is not None:
        raise ValueError(
            f"torchcall: SevenNet: modal: expected None for a model with one modality, got "
            f"{modal!r}"
        )
    if modals and modal not in list(modals):
        raise ValueError(f"torchcall: SevenNet: modal: expected one of {names}, got {modal!r}")
    return modals[modal] if modal is not None else -1


def _short(name: str) -> str:
    return name.lower().replace("sevennet-", "7net-")


def _path(source: str | Path) -> Path:
    """The file of a checkpoint, from its path or the name of a pretrained model."""
    if Path(source).is_file():
        return Path(source)
    from sevenn import _const

    path = getattr(_const, _FILES[_short(str(source))])
    cached = path.replace(_const._prefix, str(Path("~/.cache/sevennet").expanduser()))
    for file in (path, cached):
        if Path(file).is_file():
            return Path(file)
    link = _const.CHECKPOINT_DOWNLOAD_LINKS.get(path, "SevenNet's releases")
    raise FileNotFoundError(
        f"torchcall: SevenNet: expected the weights of {source} at {cached}, got no file; "
        f"download {link}"
    )


def _is_deployed(source: object) -> bool:
    """Whether a file is a TorchScript archive that `sevenn` deployed for LAMMPS."""
    if not _common.is_file(source):
        return False
    try:
        with zipfile.ZipFile(str(source)) as archive:
            return any(name.endswith(f"/extra/{_SYMBOLS}") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _is_checkpoint(path: str | Path) -> bool:
    """Whether a file made by `torch.save` has the entries of a SevenNet checkpoint."""
    strings = _common.pickled_strings(path)
    return "model_state_dict" in strings and "_type_map" in strings


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings of SevenNet and e3nn about which users can do nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _traceable() -> Iterator[None]:
    """Replaces SevenNet's sum of messages, whose `len()` fixes the number of atoms in a trace."""
    from sevenn.nn import convolution

    original = convolution.message_gather
    convolution.message_gather = _sum_messages
    try:
        yield
    finally:
        convolution.message_gather = original


def _sum_messages(
    node_features: torch.Tensor, edge_dst: torch.Tensor, message: torch.Tensor
) -> torch.Tensor:
    total = message.new_zeros((node_features.shape[0], message.shape[1]))
    return total.index_add(0, edge_dst, message)
