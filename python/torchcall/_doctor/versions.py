"""Versions of Python, torchcall and the packages that it needs or can use."""

import importlib.metadata
import platform
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torchcall
from torchcall._doctor.report import Section, import_error, imported, one_line
from torchcall._versions import satisfies

NEEDED = ("numpy", "jaxlib", "jax", "torch")


class Requirement(NamedTuple):
    """A requirement in torchcall's metadata, e.g. `torch>=2.11,<2.16`."""

    package: str
    versions: str
    extra: str | None

    def __str__(self) -> str:
        return f"'{self.package}{self.versions}'" if self.versions else self.package


def probe(section: Section) -> None:
    """Reports versions; packages that are missing, too old or too new are problems."""
    folder = Path(torchcall.__file__).parent
    section.values |= {
        "torchcall": torchcall.__version__,
        "folder": str(folder),
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": f"{platform.system()} {platform.machine()}",
        "system": platform.platform(),
    }
    section.show("torchcall", f"{torchcall.__version__} ({folder})")
    section.show("Python", f"{platform.python_version()} ({sys.executable})")
    section.show("platform", platform.platform())
    _check_platform(section)
    wanted = {r.package: r for r in requirements() if r.extra is None}
    for name in NEEDED:
        _check(section, name, wanted.get(name, Requirement(name, "", None)))
    _extras(section)


def _check_platform(section: Section) -> None:
    if sys.platform not in ("linux", "darwin"):
        section.problem(
            f"expected Linux or macOS, got {platform.system()}", "wsl --install  # on Windows"
        )


def _check(section: Section, name: str, wanted: Requirement) -> None:
    found = version(name)
    section.values[name] = found
    if found is None:
        section.show(name, "not installed")
        section.problem(f"{name} is not installed", f"pip install {wanted}")
        return
    section.show(name, found)
    if not satisfies(found, wanted.versions):
        section.problem(
            f"expected {name}{wanted.versions}, got {found}", f"pip install --upgrade {wanted}"
        )
    elif (error := import_error(name)) is not None:
        others = {"jax": "jax jaxlib", "jaxlib": "jax jaxlib"}.get(
            name, f"{name}=={found.split('+')[0]}"
        )
        section.problem(
            f"{name} {found} cannot be imported: {one_line(error)}",
            f"pip install --force-reinstall {others}",
        )


def _extras(section: Section) -> None:
    found: dict[str, dict[str, str | None]] = {}
    for wanted in requirements():
        if wanted.extra is None:
            continue
        installed = version(wanted.package)
        found.setdefault(wanted.extra, {})[wanted.package] = installed
        if installed is not None and not satisfies(installed, wanted.versions):
            section.note(
                f"expected {wanted.package}{wanted.versions} for torchcall[{wanted.extra}], got "
                f"{installed}",
                f"pip install --upgrade {wanted}",
            )
    section.values["extras"] = found
    packages = {package: got for group in found.values() for package, got in group.items()}
    installed = [f"{package} {got}" for package, got in sorted(packages.items()) if got]
    section.show("optional packages", ", ".join(installed) or "none")


def version(name: str) -> str | None:
    """The version of an installed package, torch's with its build (`2.13.0+cpu`), or None.

    The package that is imported counts, whatever an older installation left beside it.
    """
    module = imported(name) if name in NEEDED else sys.modules.get(name)
    found = getattr(module, "__version__", None)
    if found is None:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None
    return str(found)


def requirements() -> list[Requirement]:
    """torchcall's requirements, from its metadata; empty if it has none."""
    try:
        lines = importlib.metadata.requires("torchcall") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    found: list[Requirement] = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        parts = re.match(r"\s*([\w.-]+)\s*(?:\[[^]]*\])?\s*\(?([^)]*)\)?", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", marker)
        if parts:
            versions = ",".join(sorted(parts[2].replace(" ", "").split(","), reverse=True))
            found.append(Requirement(parts[1], versions, extra[1] if extra else None))
    return found
