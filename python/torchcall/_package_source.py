"""AOTInductor packages (`.pt2`): machine code for one torch, one device and one kind of machine."""

import os
import platform
from pathlib import Path

import torch

from torchcall import _bridge
from torchcall._call import Call
from torchcall._package import PackageMetadata, read_package, read_sources
from torchcall._package_call import PackageCall

# Calls that can be under way at once; each further runner costs little, its weights are shared.
_MOST_RUNNERS = 16

# The vector instructions that torch's compiler names, and torch's own look at this machine.
_ISA_CHECKS = {
    "AVX2": "_is_avx2_supported",
    "AVX512": "_is_avx512_supported",
    "AVX512_VNNI": "_is_vnni_supported",
    "AMX_TILE": "_is_amx_tile_supported",
}

# What torch copies into the source of every package, and a name by which it is found there.
_INTERFACE = Path(torch.__file__).parent / "_inductor/codegen/aoti_runtime/interface.cpp"
_ENTRY_POINT = "AOTInductorModelContainerCreate("


class PackageSource:
    """A package file. What it says of itself is read before its code is loaded."""

    engine = "AOTInductor"
    weights = "own"

    def __init__(self, path: Path) -> None:
        self._metadata = _checked(path)
        self._read = True  # since it was loaded last
        self._path = path.resolve()
        own = self._metadata.torchcall
        self.label = path.stem if own is None else str(own["name"])
        self.name = path.name if own is None else f"{self.label} ({path.name})"

    @property
    def path(self) -> Path | None:
        """The file."""
        return self._path

    @property
    def metadata(self) -> PackageMetadata:
        """What the package says of itself."""
        return self._metadata

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Loads the package's code and weights.

        Raises:
            ValueError: it is not for this torch, device or machine, or does not load.
        """
        del requires_grad  # gradients are among its results
        if freeze:
            raise ValueError("freeze=True: expected a TorchScript module, got a package")
        metadata = self._metadata if self._read else _checked(self._path)
        self._read = False
        if _form(metadata) != _form(self._metadata):
            raise ValueError(
                "refresh: expected a package with the same arguments and results, got another "
                "one; make a new wrapper"
            )
        self._metadata = metadata
        # The package's own checks of its inputs. It looks once, when it runs for the first time.
        os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
        runners = min(os.cpu_count() or 1, _MOST_RUNNERS)
        try:
            return _bridge.Model.from_package(str(self._path), _home(metadata), runners)
        except ValueError as error:
            raise ValueError(
                f"the package does not load with torch {torch.__version__}; if another torch "
                f"compiled it, compile the model here: {error}"
            ) from error

    def look_at(self, model: _bridge.Model, call: Call) -> PackageCall:
        """Settles a call; see `EngineCall`."""
        return PackageCall(model.schema, self._metadata.torchcall, self._metadata.device, call)


def _form(metadata: PackageMetadata) -> object:
    own = metadata.torchcall
    if own is None:
        return None
    keys = ("inputs", "outputs", "capacity", "minimum", "cutoff", "compute_cell_gradients")
    return [own[key] for key in keys]


def _checked(path: Path) -> PackageMetadata:
    """Reads a package's metadata and makes sure that its code can run here."""
    metadata = read_package(path)

    def refuse(expected: str, got: str) -> ValueError:
        return ValueError(
            f"torchcall: {path}: expected a package compiled for {expected}, got one for {got}; "
            "compile the model here"
        )

    if metadata.device not in ("cpu", "cuda"):
        raise refuse("cpu or cuda", metadata.device)
    if metadata.device == "cuda" and not torch.cuda.is_available():
        raise refuse("a device that torch can use here", "cuda")
    own = metadata.torchcall
    if own is not None and _minor(own["torch"]) != _minor(torch.__version__):
        raise refuse(f"torch {torch.__version__}", f"torch {own['torch']}")
    if own is None and not _is_of_this_torch(path):
        raise refuse(f"torch {torch.__version__}", "another torch, whose code it contains")
    if metadata.machine not in (None, platform.machine()):
        raise refuse(f"a machine {platform.machine()}", f"a machine {metadata.machine}")
    lacking = [name for name in (metadata.isa or "").split() if not _has_instructions(name)]
    if lacking:
        raise refuse("this processor", f"one with {', '.join(lacking)}, which this processor lacks")
    return metadata


def _home(metadata: PackageMetadata) -> int | None:
    """The CUDA device on which a package is loaded at once, None for the CPU."""
    return torch.cuda.current_device() if metadata.device == "cuda" else None


def _is_of_this_torch(path: Path) -> bool:
    """Whether a package contains the code that this torch puts into each, or none to compare.

    Packages do not tell the version of torch. Their source has one file of torch's, word for word.
    """
    try:
        ours = _words(_INTERFACE.read_text())
    except OSError:
        return True
    theirs = [_words(text) for text in read_sources(path) if _ENTRY_POINT in text]
    return not theirs or any(ours in text for text in theirs)


def _words(text: str) -> str:
    return " ".join(text.split())


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def _has_instructions(name: str) -> bool:
    check = getattr(torch.cpu, _ISA_CHECKS.get(name, ""), None)
    return True if check is None else bool(check())
