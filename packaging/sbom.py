"""The wheel's software bill of materials: CycloneDX, in `dist-info/sboms` (PEP 770).

Lists the code of others that is compiled in, as licenses/README.md does. It has no time and no
random number: the same build gives the same file.
"""

import json
from pathlib import Path
from typing import Any


def component(name: str, version: str | None, licence: str) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "library", "name": name}
    found["licenses"] = [{"license": {"id": licence}}]
    if version is None:  # part of the component that is listed before it
        return found
    reference = f"pkg:pypi/{name}@{version}"
    return {**found, "version": version, "purl": reference, "bom-ref": reference}


def write(path: Path, version: str, nanobind: str, jaxlib: str, torch: list[str]) -> Path:
    """Writes the file for a torchcall of this version, from the versions that it was built with."""
    parts = [
        component("nanobind", nanobind, "BSD-3-Clause"),
        component("robin-map", None, "MIT"),
        component("jaxlib", jaxlib, "Apache-2.0"),
        *(component("torch", each, "BSD-3-Clause") for each in torch),
        component("dlpack", None, "Apache-2.0"),
    ]
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": component("torchcall", version, "Apache-2.0")},
        "components": parts,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(bom, indent=1) + "\n")
    return path
