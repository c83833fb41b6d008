# One task file. Every target sets itself up: a .venv with pinned dependencies, and the build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard $(foreach d,csrc csrc/xla csrc/xla/cuda csrc/torch csrc/torch/script tests/standin,$d/*.h $d/*.cc))
# An editable install knows the modules that it was made with: a folder is newer when one comes or goes.
FOLDERS := $(filter-out %__pycache__,$(patsubst %/,%,$(wildcard python/torchcall/ python/torchcall/*/ python/torchcall/*/*/)))
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test test-fast test-kups lint format types stubs bench bench-mace gpu-check docs sanitize clean

help:
	@echo "make demo       argon atoms under a PyTorch potential inside one jitted loop"
	@echo "make test       the whole test suite"
	@echo "make test-fast  the same without the slow ones"
	@echo "make test-kups  our potential beside kUPS' own, in an environment of its own (5.7 GB)"
	@echo "make lint       ruff and clang-format;  make format  lets them write"
	@echo "make types      pyright"
	@echo "make bench      the benchmarks, into benchmarks/results/, and their figure"
	@echo "make bench-mace MACE as eager modules, TorchScript and a package; installs mace-torch first"
	@echo "make gpu-check  what needs a GPU: build, tests and benchmarks, with what python3 has; no network"
	@echo "make  the GPU tests with torch and JAX for CUDA over devices that are played"
	@echo "make sanitize   the tests of the bridge against a build with AddressSanitizer"

$(VENV)/.installed: requirements/dev.txt requirements/constraints.txt
	@echo "torchcall: installing pinned dependencies into $(VENV) (about two minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet -r requirements/dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed CMakeLists.txt tests/standin/standin.cmake pyproject.toml $(NATIVE) $(FOLDERS)
	@echo "torchcall: building the two native libraries against the installed torch (about two minutes, once)"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable . \
	  -C cmake.define.TORCHCALL_STANDIN=ON
	@touch $@

setup: $(VENV)/.built

demo: setup
	@$(BIN)/python -m torchcall demo

# A process per core; a file's tests stay together, for they share what they compiled. In the order
# of the files: by number of tests, the few long ones would come last, and one core would wait. A
# process that has a core to itself needs one thread of torch's.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup
	@$(PYTEST)
	@echo "torchcall: every test passed. Next: make demo, or make bench."

test-fast: setup
	@$(PYTEST) -m "not slow"

# kUPS wants Python 3.12, which is not torchcall's pinned one, and a torch of its own choosing.
PYTHON_KUPS ?= python3.12
KUPS_VENV ?= .venv-kups
test-kups:
	@$(PYTHON_KUPS) -m venv $(KUPS_VENV)
	@$(KUPS_VENV)/bin/python -m pip install --quiet kups==1.0.8 torch==2.13.0 jax jaxtyping pytest \
	  scikit-build-core nanobind cmake ninja
	@$(KUPS_VENV)/bin/python -m pip install --quiet --no-build-isolation --no-deps .
	@$(KUPS_VENV)/bin/python -m pytest -p no:cacheprovider tests/kups

lint: $(VENV)/.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(VENV)/.installed
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(NATIVE)

types: setup
	@$(BIN)/pyright

stubs: setup
	@$(BIN)/python -m nanobind.stubgen -m torchcall._bridge -o python/torchcall/_bridge.pyi
	@$(BIN)/ruff format --quiet python/torchcall/_bridge.pyi

bench: setup
	@$(BIN)/python benchmarks/call_overhead.py --json benchmarks/results/call_overhead.json
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/md_loop.py --json benchmarks/results/md_loop.json
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/md_loop.py --only engines --json benchmarks/results/engines.json
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/script_options.py --json benchmarks/results/script_options.json
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/output_copies.py --json benchmarks/results/output_copies.json
	@$(BIN)/python benchmarks/neighbor_list.py --json benchmarks/results/neighbor_list.json
	@$(BIN)/python benchmarks/plot_results.py

# Without dependencies: mace-torch would bring another torch. requirements/mace.txt has those it needs here.
bench-mace: setup
	@$(BIN)/python -m pip install --quiet --no-deps -r requirements/mace.txt
	@$(BIN)/python -W ignore benchmarks/mace_engines.py --json benchmarks/results/mace_engines.json

# With the packages that $(PYTHON) has, and nothing fetched: docs/gpu.md. GPU_CHECK takes further options.
SECTIONS ?=
GPU_CHECK ?=
gpu-check:
	@$(PYTHON) benchmarks/gpu_check.py $(SECTIONS) $(GPU_CHECK)

# A build of its own in build/sanitize, imported in place of the ordinary one. Leaks are left out:
# Python and its extensions keep memory until the process ends.
SANITIZER ?= address
SANITIZE_TESTS ?= tests/test_numerics.py tests/test_outputs.py tests/engines
sanitize: setup
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --upgrade --target build/sanitize . \
	  -C cmake.define.TORCHCALL_SANITIZE=$(SANITIZER) -C build-dir=build/sanitize-objects -C cmake.build-type=RelWithDebInfo
	@LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so) \
	  ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 PYTHONPATH=build/sanitize \
	  $(BIN)/python -c "$$SANITIZED" -p no:cacheprovider $(SANITIZE_TESTS)
# The editable install's finder comes before the path; without it, PYTHONPATH decides.
define SANITIZED
import sys
sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
import pytest, torchcall
assert "build/sanitize" in torchcall._bridge.__file__, torchcall._bridge.__file__
sys.exit(pytest.main(sys.argv[1:]))
endef
export SANITIZED

clean:
	rm -rf build $(VENV)/.built
