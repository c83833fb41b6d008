"""Report versions, devices, caches and settings, and test each engine.

Each problem is printed with the command that fixes it. The exit status is 0 without problems and 1
with one. Notes do not count. See docs/doctor.md.
"""

import argparse
import json


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `doctor`."""
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead")
    add("--compile", action="store_true", help="also compile a small package (half a minute)")


def run(options: argparse.Namespace) -> int:
    """Returns 1 if there is a problem."""
    from torchcall._doctor.run import report

    found = report(compile=options.compile, own_process=True, show=not options.json)
    if options.json:
        print(json.dumps(found, indent=2))
    return int(not found["ok"])
