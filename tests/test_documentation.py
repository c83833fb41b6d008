"""The Python examples in the README and the docs run, top to bottom, each file in one namespace."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def _examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if _examples(p)], ids=lambda p: p.name)
def test_every_example_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path / "cache"))
    # TorchScript reads a class's source from a file.
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text("\n".join(_examples(page)))
    exec(compile(script.read_text(), script, "exec"), {"__name__": script.stem})


@pytest.mark.parametrize(
    "page", [*PAGES, *sorted((ROOT / "docs" / "networks").glob("*.md"))], ids=lambda p: p.name
)
def test_links_point_to_existing_files(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"
