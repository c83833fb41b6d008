"""Which results a picture is drawn from, and whether it was drawn from these."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from _results import FOLDER, ROOT

PICTURES = {
    "call_overhead": ["call_overhead"],
    "engines": ["md_loop"],
    "networks": ["networks_chgnet", "networks_mace", "networks_nequip", "networks_sevennet"],
}


def digest(paths: Iterable[Path]) -> str:
    """A digest of results files."""
    found = hashlib.sha256()
    for path in paths:
        found.update(path.read_bytes())
    return f"results {found.hexdigest()[:16]}"


def outdated() -> list[str]:
    """Committed pictures that other results were drawn into."""
    found: list[str] = []
    for name, sources in PICTURES.items():
        path = ROOT / f"docs/images/{name}.png"
        mark = digest(FOLDER / f"{source}.json" for source in sources).encode()
        if not path.exists() or mark not in path.read_bytes():
            found.append(f"docs/images/{name}.png: not drawn from these results; run make tables")
    return found
