"""Results of the checks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        requirement: the property that was checked.
        error: largest deviation, relative to the size of the compared values.
        tolerance: deviation that rounding and finite differences explain.
        advice: consequence of a failure in a simulation, and likely causes.
    """

    requirement: str
    error: float
    tolerance: float
    advice: str

    @property
    def passed(self) -> bool:
        """Whether the deviation is within the tolerance; false for NaN."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        line = f"{'ok  ' if self.passed else 'FAIL'} {self.requirement}: error {self.error:.1e}"
        if self.passed:
            return line
        return f"{line}, expected at most {self.tolerance:.1e}\n     {self.advice}"


@dataclass(frozen=True)
class CheckReport:
    """Report of `check_model`; readable with `print`.

    Attributes:
        findings: one for each check.
        notes: the precision that the dtype allows, and what was not checked.
    """

    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(finding.passed for finding in self.findings)

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The checks that failed."""
        return tuple(finding for finding in self.findings if not finding.passed)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), *(f"note {note}" for note in self.notes)])
