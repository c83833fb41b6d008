"""Report versions and devices, and test each engine."""

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds none."""
    del parser


def run(options: argparse.Namespace) -> int:
    """Returns 1 if a test failed."""
    del options
    import torchcall

    return int(any("FAILED" in value for value in torchcall.doctor().values()))
