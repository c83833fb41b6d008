"""Parts of the report, and how they are printed."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Finding:
    """What is wrong or worth knowing, and the command that changes it."""

    what: str
    remedy: str


@dataclass
class Section:
    """One part of the report.

    Attributes:
        name: Its key in the JSON object.
        values: Its JSON values, under stable keys.
        lines: What is printed, a label and a text each.
        problems: These make the exit status 1.
        notes: These do not.
    """

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Finding] = field(default_factory=list)
    notes: list[Finding] = field(default_factory=list)

    def show(self, label: str, text: object) -> None:
        """Adds a line."""
        self.lines.append((label, str(text)))

    def problem(self, what: str, remedy: str) -> None:
        """Adds what is wrong, with the command that fixes it."""
        self.problems.append(Finding(what, remedy))

    def note(self, what: str, remedy: str) -> None:
        """Adds what is not wrong but may be unexpected, with the command that changes it."""
        self.notes.append(Finding(what, remedy))


def examined(name: str, probe: Callable[[Section], None]) -> Section:
    """Runs a probe. What it raises becomes a problem, and what it found before stays."""
    section = Section(name)
    try:
        probe(section)
    except (Exception, SystemExit) as error:
        section.show("not examined", one_line(error))
        section.problem(f"cannot be examined: {one_line(error)}", "torchcall doctor --json")
    return section


def one_line(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}".removesuffix(": ")


def imported(name: str) -> ModuleType | None:
    """The module, or None if it cannot be imported."""
    return None if import_error(name) else sys.modules[name]


def import_error(name: str) -> BaseException | None:
    """What importing the module raises. Damaged installations raise all sorts of errors."""
    try:
        importlib.import_module(name)
    except (Exception, SystemExit) as error:
        return error
    return None


def printed(section: Section) -> str:
    """The section as text."""
    width = max((len(label) for label, _ in section.lines), default=0)
    lines = [f"  {label:<{width}}  {text}".rstrip() for label, text in section.lines]
    return "\n".join([section.name.replace("_", " "), *lines])


def summary(sections: list[Section]) -> str:
    """Notes and problems as text, each with its command."""
    lines: list[str] = []
    for kind in ("notes", "problems"):
        found = [(section, finding) for section in sections for finding in getattr(section, kind)]
        if found or kind == "problems":
            lines.append(f"{kind}: {len(found) or 'none'}")
        for section, finding in found:
            lines.append(f"  {section.name.replace('_', ' ')}: {finding.what}")
            lines.append(f"    {'fix' if kind == 'problems' else 'to change'}: {finding.remedy}")
    return "\n".join(lines)


def as_json(sections: list[Section]) -> dict[str, Any]:
    """The report as one JSON object; its keys are in docs/doctor.md."""

    def findings(kind: str) -> list[dict[str, str]]:
        return [
            {"section": section.name, "what": finding.what, "remedy": finding.remedy}
            for section in sections
            for finding in getattr(section, kind)
        ]

    problems, notes = findings("problems"), findings("notes")
    parts = {section.name: section.values for section in sections}
    return {"ok": not problems, "problems": problems, "notes": notes, **parts}
