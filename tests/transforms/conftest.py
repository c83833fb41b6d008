"""The package that tests of packages use."""

from compiled_tree import tree  # noqa: F401
