"""The engine for AOTInductor packages (`.pt2`): code compiled for one torch, device and machine."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from torchcall import _bridge
from torchcall._call.call import Call
from torchcall._call.plan import PlanSpec
from torchcall._engines.content import FileContent
from torchcall._engines.package_call import PackageCall, check_sizes
from torchcall._engines.package_file import PackageMetadata, read_package, read_sources
from torchcall._undocumented.of_torch import PACKAGE_INTERFACE, processor_has
from torchcall._versions import minor

# The number of concurrent calls; runners share the weights.
_MAX_RUNNERS = 16

# A name that occurs only in a package's copy of `PACKAGE_INTERFACE`.
_ENTRY_POINT = "AOTInductorModelContainerCreate("


class PackageSource:
    """A package file. Its metadata is read and checked before its code is loaded."""

    engine = "AOTInductor"
    weights = "own"

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._verified: FileContent | None = FileContent(path)  # None after it was loaded
        self._metadata = _checked(path)
        own = self._metadata.torchcall
        self.label = path.stem if own is None else str(own["name"])
        self.name = path.name if own is None else f"{self.label} ({path.name})"

    @property
    def path(self) -> Path | None:
        """The file."""
        return self._path

    @property
    def metadata(self) -> PackageMetadata:
        """The package's metadata."""
        return self._metadata

    def load(self, *, freeze: bool, requires_grad: bool) -> _bridge.Model:
        """Loads the package's code and weights.

        Raises:
            ValueError: it is for another torch, device or machine, or does not load.
        """
        del requires_grad  # gradients are compiled in
        if freeze:
            raise ValueError("freeze=True: expected a TorchScript module, got a package")
        file = self._verified or FileContent(self._path)
        metadata = self._metadata if self._verified else _checked(self._path)
        self._verified = None
        if _signature(metadata) != _signature(self._metadata):
            raise ValueError(
                "refresh: expected a package with the same arguments, results and gradients, got "
                "another one; make a new wrapper"
            )
        self._metadata = metadata
        # Packages read this at their first run. It enables the checks compiled into them.
        os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
        runners = min(os.cpu_count() or 1, _MAX_RUNNERS)
        try:
            model = _bridge.Model.from_package(str(self._path), _home(metadata), runners)
        except ValueError as error:
            raise ValueError(
                f"the package does not load with torch {torch.__version__}; if another torch "
                f"compiled it, compile the model here: {error}"
            ) from error
        file.require_unchanged()
        model.file = file
        return model

    def python_module(self, model: _bridge.Model) -> dict[str, Any]:
        """The section `user` of the package's metadata; empty for packages of another origin."""
        del model
        return {} if self._metadata.torchcall is None else self._metadata.torchcall["user"]

    def prepare_call(self, model: _bridge.Model, call: Call) -> PackageCall:
        """Checks and plans a call."""
        return PackageCall(model.schema, self._metadata.torchcall, self._metadata.device, call)

    def check_sizes(self, spec: PlanSpec) -> None:
        """Compares the operands of a plan with the package's metadata.

        Raises:
            ValueError: one does not match.
        """
        check_sizes(self._metadata.torchcall, spec)


def _signature(metadata: PackageMetadata) -> object:
    own = metadata.torchcall
    if own is None:
        return None
    return [own.get(key) for key in ("inputs", "outputs", "axes", "gradients", "user")]


def _checked(path: Path) -> PackageMetadata:
    """Reads a package's metadata and checks that its code can run here."""
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
    if own is not None and minor(own["torch"]) != minor(torch.__version__):
        raise refuse(f"torch {torch.__version__}", f"torch {own['torch']}")
    if own is None and not _is_of_this_torch(path):
        raise refuse(f"torch {torch.__version__}", "another torch, whose code it contains")
    if metadata.machine not in (None, platform.machine()):
        raise refuse(f"a machine {platform.machine()}", f"a machine {metadata.machine}")
    lacking = [name for name in (metadata.isa or "").split() if not processor_has(name)]
    if lacking:
        raise refuse("this processor", f"one with {', '.join(lacking)}, which this processor lacks")
    return metadata


def _home(metadata: PackageMetadata) -> int | None:
    """The CUDA device on which `load` loads a package, None for the CPU."""
    return torch.cuda.current_device() if metadata.device == "cuda" else None


def _is_of_this_torch(path: Path) -> bool:
    """Whether a package's source contains this torch's version of a file, or it has no source.

    Packages do not record torch's version, but torch copies that file into the source of each.
    """
    try:
        ours = _normalized(PACKAGE_INTERFACE.read_text())
    except OSError:
        return True
    theirs = [_normalized(text) for text in read_sources(path) if _ENTRY_POINT in text]
    return not theirs or any(ours in text for text in theirs)


def _normalized(text: str) -> str:
    return " ".join(text.split())
