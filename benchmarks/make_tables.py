"""Writes the tables of README and docs from the committed results.

    python benchmarks/make_tables.py            # or: make tables
    python benchmarks/make_tables.py --check    # exit with 1 if a document or a claim differs

A document has a line `<!-- table: NAME -->`, the table, and a line `<!-- end -->`. `_tables.py` and
`_tables_parts.py` have the tables, `_sentences.py` the sentences of the documents that the numbers
must support. Needs neither torch nor JAX.
"""

import argparse
import re
import sys
from pathlib import Path

from _pictures import outdated
from _results import ROOT
from _sentences import CLAIMS
from _tables_parts import TABLES

BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def documents() -> list[Path]:
    """The Markdown files that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """A document with its tables generated again.

    Raises:
        KeyError: A table's name is unknown.
    """
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)


def faults() -> list[str]:
    """Claims that a document no longer makes, or that the results do not support."""
    found: list[str] = []
    for claim in CLAIMS:
        text = " ".join((ROOT / claim.document).read_text().split())
        if claim.sentence not in text:
            found.append(f"{claim.document}: does not say: {claim.sentence}")
        values = claim.values()
        if not all(claim.least <= value <= claim.most for value in values):
            listed = ", ".join(f"{value:.2f}" for value in values)
            found.append(f"{claim.document}: the results give {listed}: {claim.sentence}")
    return found


def main(argv: list[str] | None = None) -> int:
    """Writes or checks."""
    arguments = argparse.ArgumentParser(description="Write the tables of README and docs.")
    arguments.add_argument("--check", action="store_true", help="write nothing")
    options = arguments.parse_args(argv)
    problems = faults() + (outdated() if options.check else [])
    for path in documents():
        text = path.read_text()
        new = filled(text)
        if new == text:
            continue
        name = path.relative_to(ROOT)
        if options.check:
            problems.append(f"{name}: differs from the results; run make tables")
        else:
            path.write_text(new)
            print(name)
    for problem in problems:
        print(f"torchcall: {problem}", file=sys.stderr)
    return int(options.check and bool(problems))


if __name__ == "__main__":
    sys.exit(main())
