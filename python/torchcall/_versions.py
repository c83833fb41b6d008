"""Versions of the packages that torchcall needs. Imports nothing: packaging reads it, too."""

import re

OLDEST_JAX = "0.8.1"
TORCH_MINORS = ("2.11", "2.12", "2.13", "2.14", "2.15")
# As pip takes them; pyproject.toml repeats them, and a test compares.
JAX = f"jax>={OLDEST_JAX}"
TORCH = f"torch>={TORCH_MINORS[0]},<2.{int(TORCH_MINORS[-1].split('.')[1]) + 1}"


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu → (2, 13, 0, 0), which compare as versions do. Pre-releases count as releases."""
    release = re.match(r"\d+(\.\d+)*", version)
    parts = [int(part) for part in release[0].split(".")] if release else []
    return tuple([*parts, 0, 0, 0, 0][:4])


def minor(version: str) -> str:
    """2.13.0+cpu → 2.13"""
    return ".".join(version.split("+")[0].split(".")[:2])


def satisfies(found: str, wanted: str) -> bool:
    """Whether a version is in a range such as `<2.16,>=2.11`."""
    comparisons = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for part in filter(None, wanted.split(",")):
        comparison = re.match(r"[<>=!]=?", part)
        if comparison is None or comparison[0] not in comparisons:
            continue
        if not comparisons[comparison[0]](numbers(found), numbers(part[len(comparison[0]) :])):
            return False
    return True
