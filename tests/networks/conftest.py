"""Tests with networks, each in an environment with its package: `make test-models`."""

import importlib.util
import os

import pytest

_PACKAGES = {
    "test_chgnet.py": "chgnet",
    "test_mace.py": "mace",
    "test_nequip.py": "nequip",
    "test_sevennet.py": "sevenn",
}
collect_ignore = [
    file for file, package in _PACKAGES.items() if importlib.util.find_spec(package) is None
]


@pytest.fixture(scope="session", autouse=True)
def package_cache(tmp_path_factory):
    """A cache of packages for the tests, unless the environment names one."""
    if "TORCHCALL_CACHE" not in os.environ:
        os.environ["TORCHCALL_CACHE"] = str(tmp_path_factory.mktemp("packages"))
