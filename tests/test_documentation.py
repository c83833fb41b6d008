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


def _literals(text: str) -> str:
    """Source text with adjacent string literals joined and runs of spaces as one."""
    return re.sub(r'"\s*(//[^\n]*)?\s*\n?\s*[fr]?"', "", text)


def test_every_message_on_the_page_of_errors_is_in_the_sources():
    files = [
        path
        for folder, endings in (("python", (".py",)), ("csrc", (".cc", ".h")))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in endings
    ]
    sources = _literals("\n".join(path.read_text() for path in files))
    page = (ROOT / "docs" / "errors.md").read_text()
    messages = re.findall(r"^```text\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in sources, message
