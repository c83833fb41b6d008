"""MACE, https://github.com/ACEsuit/mace: `MACE` and `ScaleShiftMACE` of the package mace-torch.

I. Batatia et al., NeurIPS 2022, https://arxiv.org/abs/2206.07697. See docs/networks/mace.md.
"""

# pyright: reportMissingImports=false
# mace-torch and e3nn are optional.

import contextlib
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import torch

from torchcall._compile._copy import inference_copy
from torchcall._engines import unpickle
from torchcall.mliap import TorchMliap
from torchcall.models import _common

NAMES: tuple[str, ...] = ()
DISTRIBUTIONS: tuple[str, ...] = ("mace-torch", "e3nn")
_CLASSES = ("MACE", "ScaleShiftMACE")
_LAMMPS = "LAMMPS_MACE"


class MaceEnergy(torch.nn.Module):
    """Energies of a MACE model.

    MACE's edge vectors are `positions[receiver] − positions[sender] + shifts`, with
    `shifts = cell_offsets @ cell`. Elements are one-hot rows `node_attrs` in the order of
    `model.atomic_numbers`. MACE's energies of atoms are summed by system here: MACE makes the
    number of systems a Python number, which cannot vary in a package.

    Args:
        model: a `mace.modules.MACE` or `ScaleShiftMACE`, or its TorchScript form.
        head: the index of the head.

    Attributes:
        cutoff: the model's `r_max`, in Å.
        species: the atomic numbers that the model knows.
    """

    numbers: torch.Tensor
    ptr: torch.Tensor
    head: torch.Tensor

    def __init__(self, model: Any, head: int = 0) -> None:
        super().__init__()
        self.model = model
        self.species = [int(number) for number in model.atomic_numbers]
        self.cutoff = float(model.r_max)
        self.register_buffer("numbers", model.atomic_numbers.detach().clone())
        # MACE takes all systems for one, whose head is `head`.
        self.register_buffer("ptr", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("head", torch.tensor([head]))

    def forward(self, input: dict[str, torch.Tensor]) -> torch.Tensor:
        """Energy of each system, `(B,)` in eV."""
        pos, cell, batch = input["pos"], input["cell"], input["batch"]
        offsets = input["cell_offsets"]
        systems = batch.index_select(0, input["edge_index"][0])
        elements = torch.eq(input["atomic_numbers"].unsqueeze(1), self.numbers)
        data = {
            "positions": pos,
            "node_attrs": elements.to(pos.dtype),
            "edge_index": input["edge_index"],
            "shifts": (offsets.unsqueeze(2) * cell.index_select(0, systems)).sum(1),
            "unit_shifts": offsets,
            "cell": cell[0],
            "batch": torch.zeros_like(batch),
            "ptr": self.ptr,
            "head": self.head,
        }
        per_atom = self.model(data, compute_force=False)["node_energy"]
        assert per_atom is not None
        total = torch.zeros(cell.size(0), dtype=per_atom.dtype, device=per_atom.device)
        return total.index_add(0, batch, per_atom).to(pos.dtype)


def recognises(source: object) -> bool:
    """Whether a source is a MACE model, a pickle of one, or a TorchScript archive of one."""
    if not _common.is_file(source):
        return _common.is_module_of(source, "mace") or _script_class(source) is not None
    assert isinstance(source, str | Path)
    if any(name.startswith("mace.") for name in _common.pickled_names(source)):
        return True
    return _is_scripted(source)


@_common.one_at_a_time
def load(
    source: str | Path | torch.nn.Module,
    *,
    head: str | None = None,
    dtype: Any = None,
    engine: Literal["auto", "eager", "script", "package"] = "auto",
    device: Any = None,
    verbose: bool = True,
    **options: Any,
) -> TorchMliap:
    """Loads a MACE model.

    A `.model` file is a pickle: loading it runs code that it contains, as MACE itself does. Load
    only files from sources that you trust.

    Args:
        source: a `.model` file of MACE's training; a TorchScript file, `_compiled.model` or
            `-lammps.pt`; or a `MACE` or `ScaleShiftMACE` in memory.
        head: name of the head of a model with several. None: the only one, or the one named
            "default"; for a LAMMPS file the one that it was made for.
        dtype, engine, device, verbose: see `torchcall.models.load`. TorchScript files cannot be
            compiled into packages.
        **options: options of `TorchModuleWrapper`, and `example`, see `TorchMliap.from_energy`.

    Returns:
        The potential.

    Raises:
        ValueError: the file does not load, or the head does not exist; the message lists the heads.
        TypeError: the source is neither `MACE` nor `ScaleShiftMACE`.
        ImportError: mace-torch is missing.
    """
    with _imports():
        _common.require("mace", "mace")  # before e3nn, whose constants load only then
        _common.require("mace.modules", "mace")
        model = _read(source)
    lammps_head = None
    if _class_name(model) == _LAMMPS:
        lammps_head = int(model.head[0])
        model = model.model
    _check(model)
    index = _head(model, head, lammps_head)
    if engine == "package":
        model = prepared(model)
    from e3nn.util import jit

    heads = _heads(model)
    title = f"MACE: {_class_name(model)}" + (f", head {heads[index]!r}" if len(heads) > 1 else "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript's about the source of mace and e3nn
        return _common.build(
            MaceEnergy(model, index),
            title=title,
            engine=engine,
            dtype=dtype,
            device=device,
            script=jit.script,
            verbose=verbose,
            **options,
        )


def prepared(model: Any) -> Any:
    """The same model in a form that can be compiled into a package.

    e3nn usually converts parts of a model to TorchScript, which makes the numbers of atoms and
    edges constants. The model is built again without it, and given the same weights.

    Raises:
        TypeError: the model is in TorchScript.
        ValueError: the new model's energies differ: MACE's tools did not find all of its options.
    """
    name = _class_name(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "torchcall: MACE: engine='package': expected a model that is not TorchScript, got the "
            f"TorchScript form of {name}; load the .model file that it was made from"
        )
    from mace.tools.compile import simplify
    from mace.tools.scripts_utils import extract_config_mace_model

    named: Any = model if name == "ScaleShiftMACE" else _AsScaleShift(model)
    config = extract_config_mace_model(named)
    if named is not model:
        del config["atomic_inter_scale"], config["atomic_inter_shift"]
    dtype = next(model.parameters()).dtype
    with _building(dtype):
        built = simplify(type(model)(**config))
    found = built.load_state_dict(model.state_dict(), strict=False)
    weights = {key for key, _ in built.named_parameters()}
    lost = sorted(weights & set(found.missing_keys))
    built = built.to(dtype).eval()
    if lost or not _agree(model, built):
        raise ValueError(
            f"torchcall: MACE: engine='package': expected a {name} that MACE's "
            "extract_config_mace_model rebuilds, got one whose copy has other energies"
            + (f" and lacks {lost[0]}" if lost else "")
            + "; use engine='script' or 'eager'"
        )
    return built


class _AsScaleShift:
    """Shows a `MACE` to `extract_config_mace_model`, which refuses all but `ScaleShiftMACE`."""

    scale_shift = SimpleNamespace(scale=torch.ones(1), shift=torch.zeros(1))

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


_AsScaleShift.__name__ = "ScaleShiftMACE"


def _agree(model: Any, built: Any) -> bool:
    """Whether two models have the same energies for a small cluster of all elements and heads."""
    species = model.atomic_numbers.cpu()
    n, dtype = 2 * len(species), torch.float64
    pair = [inference_copy(part).to(dtype=dtype) for part in (model, built)]
    generator = torch.Generator().manual_seed(0)
    pos = torch.rand(n, 3, generator=generator, dtype=torch.float64) * float(model.r_max) * 0.8
    index = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    index = index[:, index[0] != index[1]]
    graph = {
        "pos": pos.to(dtype),
        "atomic_numbers": species.repeat(2),
        "cell": torch.eye(3, dtype=dtype)[None],
        "edge_index": index,
        "cell_offsets": torch.zeros(index.shape[1], 3, dtype=dtype),
        "batch": torch.zeros(n, dtype=torch.int64),
    }
    for head in range(len(_heads(model))):
        with torch.no_grad():
            energies = [
                MaceEnergy(part, head)({key: value.clone() for key, value in graph.items()})
                for part in pair
            ]
        if not torch.allclose(energies[0], energies[1], rtol=1e-6, atol=1e-6 * n):
            return False
    return True


def _read(source: Any) -> Any:
    """The model in a file, or the source itself."""
    if not isinstance(source, str | Path):
        return source
    if not Path(source).is_file():
        raise FileNotFoundError(f"torchcall: MACE: expected a file, got {str(source)!r}")
    if _is_scripted(source):
        return torch.jit.load(source, map_location="cpu")
    try:
        return unpickle(Path(source))
    except TypeError as error:
        raise TypeError(
            f"torchcall: MACE: {source}: expected a model, as MACE's training writes to "
            f"NAME.model, got a file of weights or of a training state: {error}"
        ) from error


def _is_scripted(path: str | Path) -> bool:
    """Whether a file is a TorchScript archive with MACE's classes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any("/code/__torch__/mace/" in name for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _script_class(source: object) -> str | None:
    """The class of a scripted MACE model; None for everything else."""
    if not isinstance(source, torch.jit.ScriptModule):
        return None
    name = getattr(source, "original_name", None)
    return name if name in (*_CLASSES, _LAMMPS) else None


def _class_name(model: Any) -> str:
    return _script_class(model) or type(model).__name__


def _check(model: Any) -> None:
    """Raises TypeError unless a model is a `MACE` or `ScaleShiftMACE` of positions and elements."""
    name = _class_name(model)
    if name not in _CLASSES:
        advice = (
            "; load the .model file that it was made from" if name == "LAMMPS_MLIAP_MACE" else ""
        )
        raise TypeError(
            f"torchcall: MACE: expected a {' or a '.join(_CLASSES)}, got a {name}{advice}"
        )
    if hasattr(model, "joint_embedding"):
        inputs = ", ".join(getattr(model, "embedding_specs", {}))
        raise TypeError(
            f"torchcall: MACE: expected a {name} of positions and elements only, got one that also "
            f"takes {inputs}"
        )


def _heads(model: Any) -> list[str]:
    return [str(head) for head in getattr(model, "heads", None) or ["Default"]]


def _head(model: Any, name: str | None, default: int | None) -> int:
    """The index of a head.

    Raises:
        ValueError: there is no such head, or none was named and there are several.
    """
    heads = _heads(model)
    if name is None and default is not None:
        return default
    if name is None and len(heads) == 1:
        return 0
    found = [
        i
        for i, head in enumerate(heads)
        if (head.lower() == "default" if name is None else head == name)
    ]
    if not found:
        got = "none" if name is None else repr(name)
        raise ValueError(
            f"torchcall: MACE: head: expected one of {', '.join(map(repr, heads))}, got {got}"
        )
    return found[0]


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """Keeps imports and unpickling quiet, and restores the environment and the default dtype.

    mace sets TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD, which makes every later `torch.load` unpickle.
    """
    variable, dtype = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", torch.get_default_dtype()
    before = os.environ.get(variable)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


@contextlib.contextmanager
def _building(dtype: torch.dtype) -> Iterator[None]:
    """Makes e3nn build modules without TorchScript, and torch build tensors of a dtype."""
    import e3nn

    settings, default = e3nn.get_optimization_defaults(), torch.get_default_dtype()
    e3nn.set_optimization_defaults(jit_script_fx=False)
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(default)
        e3nn.set_optimization_defaults(jit_script_fx=settings["jit_script_fx"])
