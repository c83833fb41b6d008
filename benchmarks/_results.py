"""Reads results files and writes their numbers as people read them. Needs neither torch nor JAX."""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks/results"


class Results:
    """One results file."""

    def __init__(self, path: Path) -> None:
        self.document: dict[str, Any] = json.loads(path.read_text())
        self.path = path
        self._rows = {(row["case"], row["method"]): row for row in self.document["rows"]}

    def case(self, beginning: str) -> str:
        """The case of that name, or the one whose name begins so; `*` stands for any text.

        Raises:
            KeyError: There is none, or more than one.
        """
        cases = {case for case, _ in self._rows}
        found = {beginning} & cases or {
            case for case in cases if fnmatchcase(case, f"{beginning}*")
        }
        if len(found) != 1:
            raise KeyError(f"{self.path.name}: expected one case '{beginning}…', got {len(found)}")
        return found.pop()

    def has_case(self, case: str) -> bool:
        """Whether there is a case of exactly this name."""
        return any(case == found for found, _ in self._rows)

    def row(self, beginning: str, method: str) -> dict[str, Any]:
        """The row of a method in the case whose name begins so."""
        return self._rows[self.case(beginning), method]

    def has(self, beginning: str, method: str) -> bool:
        """Whether the case has this method."""
        return (self.case(beginning), method) in self._rows

    def us(self, beginning: str, method: str) -> float:
        """Median µs."""
        return self.row(beginning, method)["us_median"]

    def spread(self, beginning: str, method: str) -> str:
        """Median ± interquartile range, in ms."""
        row = self.row(beginning, method)
        return f"{digits(row['us_median'] / 1e3)} ± {digits(row['us_iqr'] / 1e3)}"

    def ratio(self, beginning: str, method: str, base: str, *, least: bool = False) -> float:
        """Median of a method over that of another one, or their least times."""
        key = "us_least" if least else "us_median"
        return self.row(beginning, method)[key] / self.row(beginning, base)[key]

    def machine(self) -> str:
        """Processor, cores, and versions of jax and torch."""
        machine, versions = self.document["machine"], self.document["versions"]
        cores = f"{machine['cores']} core{'s' * (machine['cores'] > 1)}"
        found = f"{plain(machine['cpu'])}, {cores}, jax {versions['jax']}"
        return f"{found}, torch {versions['torch']}"

    def where(self) -> str:
        """The command, machine, versions and date of the run, in one sentence."""
        machine, versions = self.document["machine"], self.document["versions"]
        measured = self.document.get("measured", {})
        omp = measured.get("OMP_NUM_THREADS")
        command = measured.get("command")
        prefix = f"OMP_NUM_THREADS={omp} " if omp else ""
        cores = f"{machine['cores']} core{'s' * (machine['cores'] > 1)}"
        packages = ", ".join(
            f"{name.removesuffix('-torch')} {versions[name]}"
            for name in versions
            if name not in ("python", "torchcall", "jaxlib", "numpy")
        )
        parts = [
            *([f"`{prefix}python benchmarks/{command}`"] if command else []),
            f"{plain(machine['cpu'])}, {cores}",
            f"Python {versions['python']}, {packages}",
            *([f"{measured['date']}, {measured['commit']}"] if measured else []),
        ]
        return f"<sub>{'; '.join(parts)}.</sub>"


@cache
def results(name: str) -> Results:
    """The committed results of that name."""
    return Results(FOLDER / f"{name}.json")


def plain(cpu: str) -> str:
    """A processor's name without trade marks."""
    return cpu.replace("(R)", "").replace("(TM)", "").removesuffix(" Processor")


def digits(value: float) -> str:
    """Three significant digits; thousands apart."""
    if value < 100:
        return f"{value:#.3g}".rstrip(".")
    rounded = round(value, 2 - len(str(int(value))) + 1)
    return f"{rounded:,.0f}".replace(",", " ")


def signed(value: float) -> str:
    """The same for a number that may be negative."""
    return f"−{digits(-value)}" if value < 0 else digits(value)


def times(value: float) -> str:
    """A ratio: two significant digits."""
    return f"{value:.2f}" if value < 2 else f"{value:.1f}" if value < 10 else f"{value:.0f}"


def seconds(us: float) -> str:
    """A time with its unit."""
    for unit, scale in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)):
        if us >= scale:
            return f"{digits(us / scale)} {unit}"
    return f"{digits(1e3 * us)} ns"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)
