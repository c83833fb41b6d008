"""Fixtures that every test module shares."""

import gc
import importlib
import os
import shutil
import signal
import tempfile

import jax
import jaxlib
import models
import pytest
import torch

import torchcall

# With these and few LLVM passes, XLA compiles programs in a third of the time. By jaxlib's version:
# XLA ends the process for a flag that it does not know.
QUICK_TO_COMPILE = {
    (0, 10): "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
    (0, 12): "--xla_cpu_parallel_codegen_split_count=1",
}


def pytest_configure(config):
    """Settings of JAX, before its first use. xdist's workers and child processes inherit them.

    `TORCHCALL_TESTS_OPTIMISED=1` (as in `make test-slow`) and a CUDA device leave XLA's
    optimisations on.
    """
    # A background job may have inherited an ignored SIGINT. Tests and their children send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    quick = os.environ.get("TORCHCALL_TESTS_OPTIMISED") != "1" and not torch.cuda.is_available()
    version = tuple(map(int, jaxlib.__version__.split(".")[:2]))
    if quick and version in QUICK_TO_COMPILE:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_TO_COMPILE[version]}"
    folder = tempfile.mkdtemp(prefix="torchcall-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    settings = {
        "jax_disable_most_optimizations": quick,
        # One test process uses the programs that another has compiled.
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        # Only a folder of limited size is locked while a program is written.
        "jax_compilation_cache_max_size": 2**30,
    }
    for name, value in settings.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


@pytest.fixture(autouse=True)
def _strict_dtype_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
    """No other module uses these programs, and they make garbage collections slow.

    Garbage collections skip what remains: imported modules.
    """
    yield
    jax.clear_caches()
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _freeze_imports():
    """Garbage collections skip the many objects of imported modules.

    They also skip the objects of what shape inference imports in its first call.
    """
    importlib.import_module("torch._dynamo")

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def x64():
    """Runs the test with 64-bit JAX types."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def live_plans():
    """Counts the plans that are alive now, after a garbage collection."""

    def count() -> int:
        gc.collect()
        return torchcall._bridge.live_plans()

    return count


def pytest_sessionfinish():
    models.stop_fork_server()


def pytest_collection_modifyitems(items):
    """GPU tests skip without a device; `TORCHCALL_REQUIRE_GPU=1` turns the skip into a failure.

    `TORCHCALL_GPU_TESTS_ON_CPU=1` runs those that can run on the CPU (`tests/gpu/conftest.py`).
    """
    wanted = ("TORCHCALL_REQUIRE_GPU", "TORCHCALL_GPU_TESTS_ON_CPU")
    if torch.cuda.is_available() or any(os.environ.get(name) == "1" for name in wanted):
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        # Not `item.keywords`: they hold the names of folders too.
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
