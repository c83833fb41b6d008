"""The Python examples in the README and the docs run, top to bottom, each file in one namespace."""

import ast
import importlib
import re
import shlex
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import torchcall
from torchcall.__main__ import COMMANDS
from torchcall._command.included import argon
from torchcall._command.parsing import Parser

ROOT = Path(__file__).parent.parent
PACKAGE = Path(torchcall.__file__).parent  # installed from a wheel, it is not below ROOT
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = [*PAGES, *sorted((ROOT / "docs" / "networks").glob("*.md"))]
# Blocks of Python that do not run here: page, how many, why. Their syntax is checked, and the
# options of `load`.
NOT_RUN = {
    "README.md": (1, "needs sevenn, which test-models tests"),
    "integrations.md": (1, "needs kUPS"),
    "networks/chgnet.md": (1, "needs chgnet and a checkpoint"),
    "networks/mace.md": (1, "needs mace and a checkpoint"),
    "networks/nequip.md": (1, "needs nequip and checkpoints"),
    "networks/sevennet.md": (1, "needs sevenn and a checkpoint"),
}
# Shell commands that are neither torchcall, make nor pip.
OTHER_COMMANDS = {"MALLOC_TRIM_THRESHOLD_": "python simulation.py"}


def _examples(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def _runs(page: Path) -> Any:
    """The page as a parameter. jax-md compiles for ten seconds, and warns about dtypes."""
    is_slow = page.name == "integrations.md"
    warns = pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
    return pytest.param(page, marks=[pytest.mark.slow, warns] if is_slow else [], id=page.name)


@pytest.mark.parametrize("page", [_runs(p) for p in PAGES if _examples(p)])
def test_every_example_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHCALL_CACHE", str(tmp_path / "cache"))
    # TorchScript reads a class's source from a file.
    script = tmp_path / f"{page.stem.replace('-', '_')}.py"
    script.write_text("\n".join(_examples(page)))
    # jax-md adds integers to floats.
    promotion = "standard" if page.name == "integrations.md" else "strict"
    with jax.numpy_dtype_promotion(promotion):
        namespace = {"__name__": script.stem}
        exec(compile(script.read_text(), script, "exec"), namespace)
        if page.name == "transformations.md":
            check_forces(namespace["forces"], namespace["rows"])


def check_forces(forces: Any, rows: Any) -> None:
    """The last function of the page of transformations, called with replicas of two argon atoms."""
    pair = jnp.asarray([[0, 0, 0], [3.6, 0, 0]], jnp.float32)
    arrays = {
        "positions": pair,
        "atomic_numbers": jnp.asarray([18, 18]),
        "cell": 20 * jnp.eye(3)[None],
        "pbc": jnp.ones((1, 3), bool),
        "batch": None,
        "edge_index": jnp.asarray([[0, 1], [1, 0]]),
        "cell_offsets": jnp.zeros((2, 3)),
    }
    graph = torchcall.mliap.AtomGraph(**arrays)
    replicas = jax.tree.map(lambda leaf: jnp.stack([leaf] * jax.device_count()), graph)
    found = forces(argon(), jax.device_put(replicas, rows))
    assert found.shape == (jax.device_count(), 2, 3)
    np.testing.assert_allclose(found[:, 0], -found[:, 1])
    assert (abs(found[:, 0, 0]) > 0.01).all()


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda p: p.name)
def test_links_point_to_existing_files(page):
    for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def _literals(text: str) -> str:
    """Source text with adjacent string literals joined and runs of spaces as one."""
    return re.sub(r'"\s*(//[^\n]*)?\s*\n?\s*[fr]?"', "", text)


def test_every_message_on_the_page_of_errors_is_in_the_sources():
    files = [
        path
        for folder, endings in ((PACKAGE, (".py",)), (ROOT / "csrc", (".cc", ".h")))
        for path in folder.rglob("*")
        if path.suffix in endings
    ]
    sources = _literals("\n".join(path.read_text() for path in files))
    page = (ROOT / "docs" / "errors.md").read_text()
    messages = re.findall(r"^```text\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    assert len(messages) > 20
    for message in messages:
        for part in message.split("…"):
            assert part.strip() in sources, message


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT / "docs" if ROOT / "docs" in page.parents else ROOT))


def _blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def test_blocks_of_python_that_do_not_run_are_listed_and_parse():
    counts: Counter[str] = Counter()
    for page in ALL_PAGES:
        blocks = _blocks(page, "py") + ([] if page in PAGES else _blocks(page, "python"))
        for block in blocks:
            counts[_name(page)] += 1
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torchcall.models.load":
                    options = {"head", "modal", "model_name", "species", "dtype", "engine"}
                    assert {keyword.arg for keyword in node.keywords} <= options, ast.unparse(node)
    assert dict(counts) == {name: count for name, (count, _) in NOT_RUN.items()}


def _commands() -> list[tuple[str, list[str]]]:
    lines = []
    for page in [*ALL_PAGES, ROOT / "CONTRIBUTING.md"]:
        for block in _blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    lines.append((_name(page), words))
    return lines


@pytest.mark.parametrize("page, words", _commands(), ids=lambda v: str(v)[:60])
def test_shell_commands_name_what_exists(page, words, tmp_path, monkeypatch):
    makefile = (ROOT / "Makefile").read_text()
    while "=" in words[0] and words[0].split("=")[0] not in OTHER_COMMANDS:
        words = words[1:]
    if words[:3] == ["python", "-m", "torchcall"]:
        words = words[2:]
    if words[0] == "torchcall":
        assert words[1] in COMMANDS
        command = importlib.import_module(f"torchcall._command.{words[1]}")
        parser = Parser(words[1], command.__doc__ or "")
        command.add_options(parser)
        monkeypatch.chdir(tmp_path)
        if "--structure" in words:  # which is checked at once
            structure = Path(words[words.index("--structure") + 1])
            structure.parent.mkdir(exist_ok=True)
            structure.touch()
        parser.parse_args(words[2:])
    elif words[0] == "make":
        for target in [word for word in words[1:] if "=" not in word]:
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), page
    elif words[:2] == ["pip", "install"]:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for extras in re.findall(r"\[([^\]]+)\]", " ".join(words)):
            assert set(extras.split(",")) <= set(project["optional-dependencies"])
    else:
        assert words[0].split("=")[0] in OTHER_COMMANDS, f"{page}: {words}"


def test_every_page_is_in_the_site_and_in_the_overview():
    site = (ROOT / "mkdocs.yml").read_text()
    overview = (ROOT / "docs" / "README.md").read_text()
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = _name(page)
        assert f" {name}\n" in site
        if "/" not in name and name != "README.md":
            assert f"]({name})" in overview


def test_every_public_module_has_a_page_of_its_api():
    pages = {page.stem for page in (ROOT / "docs" / "api").glob("*.md")}
    modules = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for folder in ("models", "integrations")
        for path in (PACKAGE / folder).glob("[a-z]*.py")
    }
    modules |= {f"torchcall.{name}" for name in torchcall.__all__ if name in ("mliap", "models")}
    assert pages == modules | {"torchcall"}
