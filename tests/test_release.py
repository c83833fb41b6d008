"""The version stands in one place, and what is shipped names its licences."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import yaml

import torchcall
from torchcall import _versions
from torchcall.__main__ import main

ROOT = Path(__file__).parent.parent


def test_all_versions_agree(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == torchcall.__version__
    assert importlib.metadata.version("torchcall") == torchcall.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == torchcall.__version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_versions_of_the_requirements_stand_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {_versions.JAX, f"jaxlib>={_versions.OLDEST_JAX}", _versions.TORCH} <= set(
        project["dependencies"]
    )


def test_the_changelog_has_a_section_for_the_version():
    sections = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased" or sections[0].startswith(f"{torchcall.__version__} - ")


def test_licences_are_in_the_distribution():
    files = importlib.metadata.metadata("torchcall").get_all("License-File") or []
    assert "LICENSE" in files
    for path in (ROOT / "licenses").iterdir():
        assert f"licenses/{path.name}" in files
        assert len(path.read_text()) > 500


def test_workflows_run_targets_that_exist():
    makefile = (ROOT / "Makefile").read_text()
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(workflow.read_text())["jobs"]
        lines = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
        targets = [line.split()[1] for line in lines if line.startswith("make ")]
        assert targets
        for target in targets:
            name = target.replace("build/wheels", "$(WHEELS)")
            assert re.search(rf"^{re.escape(name)}:", makefile, re.MULTILINE), target
