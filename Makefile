# Every target sets itself up: a .venv with pinned dependencies, and the build.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
NATIVE := $(wildcard $(foreach d,csrc csrc/* csrc/*/*,$d/*.h $d/*.cc))
SIMULATED := $(wildcard tests/standin/*.h tests/standin/*.cc)
# An editable install lists its modules when it is built. A folder's time changes when a module is
# added or removed.
FOLDERS := $(filter-out %__pycache__,$(patsubst %/,%,$(wildcard python/torchcall/ python/torchcall/*/ python/torchcall/*/*/)))
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup setup-demo demo test test-slow test-models test-kups test-matrix bench-networks lint format types stubs bench tables bench-mace gpu-check docs wheel sdist sanitize clean

help:
	@echo "make demo       argon atoms under a PyTorch potential inside one jitted loop"
	@echo "make test       the test suite"
	@echo "make test-slow  the repetitions that make test leaves out, with XLA's full optimisation"
	@echo "make test-models  networks against their own ASE calculators; one environment per network"
	@echo "make test-kups  our potentials in kUPS, MACE in its driver, in a separate environment (5.7 GB)"
	@echo "make test-matrix  the wheels in dist with other versions of Python, torch and jax; CELLS selects"
	@echo "make docs       the documentation as a site, in build/site; an environment of its own, .venv-docs"
	@echo "make lint       ruff and clang-format;  make format  applies their changes"
	@echo "make types      pyright"
	@echo "make bench      the benchmarks, into benchmarks/results/, and then make tables; half an hour"
	@echo "make tables     tables and figures of README and docs, from benchmarks/results/"
	@echo "make bench-mace MACE as eager modules, TorchScript and a package; installs mace-torch first"
	@echo "make bench-networks  networks in their own ASE calculators and in torchcall"
	@echo "make gpu-check  what needs a GPU: build, tests and benchmarks, with python3's packages; no network"
	@echo "make wheel      wheels for every supported torch, in dist/: Python 3.11, and 3.12 or newer"
	@echo "make sdist      the source distribution, in dist/"
	@echo "make sanitize   the tests of the bridge against a build with AddressSanitizer"

# The interpreter that a command runs. pyenv's command python3.12 fails if 3.12 is installed but not
# selected; PYENV_VERSION selects it.
PRINT_PATH = $(1) -c 'import sys; print(sys.executable)' 2>/dev/null
interpreter = $(shell $(PRINT_PATH) || PYENV_VERSION=$$(pyenv whence $(notdir $(1)) 2>/dev/null | tail -n 1) $(PRINT_PATH))

# $(call make_venv,command,folder,oldest minor version of Python)
define make_venv
	@"$(or $(call interpreter,$(1)),false)" -c 'import sys; sys.exit(sys.version_info < (3, $(3)))' || \
	  { echo "torchcall: expected '$(1)' to run Python 3.$(3) or newer; name one with PYTHON=... or PYTHON_KUPS=..." >&2; exit 2; }
	@"$(call interpreter,$(1))" -m venv $(2)
endef

$(VENV)/.installed-demo: requirements/demo.txt requirements/md.txt requirements/constraints.txt
	@echo "torchcall: 1/2 installing the demo's dependencies into $(VENV) (once)"
	$(call make_venv,$(PYTHON),$(VENV),11)
	@$(BIN)/python -m pip install -r requirements/demo.txt
	@$(BIN)/python -m pip install --no-deps -r requirements/md.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.installed-demo requirements/dev.txt
	@echo "torchcall: installing the development dependencies into $(VENV) (once)"
	@$(BIN)/python -m pip install -r requirements/dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed-demo CMakeLists.txt pyproject.toml $(NATIVE) $(FOLDERS)
	@echo "torchcall: 2/2 building the two native libraries against the installed torch (once)"
	@$(BIN)/python -m pip install --verbose --no-build-isolation --no-deps --editable .
	@touch $@

setup-demo: $(VENV)/.built
setup: setup-demo $(VENV)/.installed
	@$(BIN)/python tests/standin/build.py

demo: setup-demo
	@$(BIN)/python -m torchcall demo

# One process per core, with one torch thread. The tests of a file share compiled programs and stay
# in one process. Files run in order: sorted by the number of tests, the few long tests would come
# last, in one process.
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test: setup
	@$(PYTEST) -m "not slow"

test-slow: setup
	@TORCHCALL_TESTS_OPTIMISED=1 $(PYTEST) -m slow

# The networks need different versions of e3nn, so each has an environment of its own, .venv-NETWORK, with
# the same torch. Their dependencies are installed without pip's resolver, which would bring another.
NETWORKS ?= $(notdir $(basename $(wildcard $(foreach n,chgnet mace nequip sevennet,requirements/$n.txt))))
WHEELS := build/wheels
$(WHEELS)/.built: $(VENV)/.installed-demo CMakeLists.txt pyproject.toml $(NATIVE) $(shell find python -name '*.py')
	@echo "torchcall: building a wheel for the networks' environments"
	@rm -rf $(WHEELS) && $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $(WHEELS) .
	@touch $@

.PRECIOUS: .venv-%/.installed .venv-%/.built
.venv-%/.installed: requirements/%.txt requirements/demo.txt requirements/constraints.txt
	@echo "torchcall: installing $* and its dependencies into .venv-$* (once)"
	$(call make_venv,$(PYTHON),.venv-$*,11)
	@.venv-$*/bin/python -m pip install -r requirements/demo.txt -c requirements/constraints.txt pytest
	@.venv-$*/bin/python -m pip install --no-deps -r requirements/$*.txt
	@touch $@

.venv-%/.built: .venv-%/.installed $(WHEELS)/.built
	@.venv-$*/bin/python -m pip install --quiet --no-deps --force-reinstall $(WHEELS)/torchcall-*.whl
	@touch $@

test-models: $(foreach n,$(NETWORKS),.venv-$n/.built)
	@set -e; for network in $(NETWORKS); do echo "torchcall: testing $$network"; \
	  OMP_NUM_THREADS=1 .venv-$$network/bin/python -m pytest -p no:cacheprovider tests/networks/test_$$network.py; done

bench-networks: $(foreach n,$(NETWORKS),.venv-$n/.built)
	@set -e; for network in $(NETWORKS); do \
	  .venv-$$network/bin/python -W ignore benchmarks/networks.py --network $$network --threads 1 2 --rounds 7 \
	    --json benchmarks/results/networks_$$network.json; done
	@$(MAKE) --no-print-directory tables

# kUPS needs Python 3.12.
PYTHON_KUPS ?= python3.12
KUPS_VENV ?= .venv-kups
test-kups:
	$(call make_venv,$(PYTHON_KUPS),$(KUPS_VENV),12)
	@$(KUPS_VENV)/bin/python -m pip install kups==1.0.8 torch==2.13.0 jax jaxtyping platformdirs pytest \
	  scikit-build-core nanobind cmake ninja
	@$(KUPS_VENV)/bin/python -m pip install --no-deps -r requirements/mace.txt
	@$(KUPS_VENV)/bin/python -m pip install --no-build-isolation --no-deps .
	@$(KUPS_VENV)/bin/python -m pytest -p no:cacheprovider tests/kups

lint: $(VENV)/.installed
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run -Werror $(NATIVE) $(SIMULATED) benchmarks/*.cc

format: $(VENV)/.installed
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/clang-format -i $(NATIVE) $(SIMULATED) benchmarks/*.cc

types: setup
	@$(BIN)/pyright

stubs: setup
	@$(BIN)/python -m nanobind.stubgen -m torchcall._bridge -o python/torchcall/_bridge.pyi
	@$(BIN)/ruff format --quiet python/torchcall/_bridge.pyi

# Each with its minutes on two cores.
BENCHMARKS := call_overhead:3 md_loop:5 script_options:1 transforms:1 output_copies:1 neighbor_list:3 scaling:3 \
  threads:3 step_shares:5 latency:4
bench: setup
	@echo "torchcall: $(words $(BENCHMARKS)) benchmarks, about half an hour; use the machine for nothing else"
	@set -e; n=0; for each in $(BENCHMARKS); do n=$$((n + 1)); name=$${each%:*}; \
	  echo; echo "torchcall: $$n/$(words $(BENCHMARKS)) $$name, about $${each#*:} min"; \
	  if [ $$name = threads ]; then unset OMP_NUM_THREADS; else export OMP_NUM_THREADS=1; fi; \
	  $(BIN)/python -W ignore benchmarks/$$name.py --json benchmarks/results/$$name.json; done
	@$(MAKE) --no-print-directory tables

# Figures and tables of README and docs, from benchmarks/results/.
tables: setup
	@$(BIN)/python benchmarks/plot_results.py && $(BIN)/python benchmarks/make_tables.py

# With --no-deps: mace-torch would bring another torch.
bench-mace: setup
	@$(BIN)/python -m pip install --quiet --no-deps -r requirements/mace.txt
	@$(BIN)/python -W ignore benchmarks/mace_engines.py --json benchmarks/results/mace_engines.json
	@$(MAKE) --no-print-directory tables

# The docstrings are read, not imported, so nothing is built.
.venv-docs/.installed: requirements/docs.txt
	@echo "torchcall: installing mkdocs into .venv-docs (once)"
	$(call make_venv,$(PYTHON),.venv-docs,11)
	@.venv-docs/bin/python -m pip install --quiet -r requirements/docs.txt
	@touch $@

docs: .venv-docs/.installed
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet
	@echo "torchcall: to read it: python -m http.server --directory build/site"

# Uses the packages that $(PYTHON) has and downloads nothing: docs/gpu.md. GPU_CHECK takes more options.
SECTIONS ?=
GPU_CHECK ?=
gpu-check:
	@$(PYTHON) benchmarks/gpu/check.py $(SECTIONS) $(GPU_CHECK)

# TORCH=2.13 builds for that torch alone, into build/wheel/partial. CONTRIBUTING.md describes the steps.
TORCH ?=
PYTHON_CP311 ?= python3.11
PYTHON_ABI3 ?= python3.12
wheel:
	@$(PYTHON) packaging/build.py --jobs $(JOBS) --torch $(TORCH) \
	  --python $(foreach p,$(PYTHON_CP311) $(PYTHON_ABI3),"$(or $(call interpreter,$p),$p)")

# Environments are made in FOLDER, by default a temporary one, and removed unless KEEP=1.
CELLS ?=
TESTS ?=
FOLDER ?=
test-matrix:
	@$(PYTHON) packaging/matrix.py $(CELLS) --jobs $(JOBS) $(if $(TESTS),--tests $(TESTS)) $(if $(FOLDER),--folder $(FOLDER))

sdist: $(VENV)/.installed-demo
	@mkdir -p dist && $(BIN)/python -c 'from scikit_build_core.build import build_sdist; print("dist/" + build_sdist("dist"))' | tail -n 1

# A separate build in build/sanitize, imported instead of the ordinary one. Leaks are not reported:
# Python and its extensions hold memory until the process ends.
SANITIZER ?= address
SANITIZE_TESTS ?= tests/test_numerics.py tests/test_outputs.py tests/engines
sanitize: setup
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --upgrade --target build/sanitize . \
	  -C cmake.define.TORCHCALL_SANITIZE=$(SANITIZER) -C build-dir=build/sanitize-objects -C cmake.build-type=RelWithDebInfo
	@LD_PRELOAD=$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so) \
	  ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 PYTHONPATH=build/sanitize \
	  $(BIN)/python -c "$$SANITIZED" -p no:cacheprovider $(SANITIZE_TESTS)
# The editable install's finder has precedence over PYTHONPATH.
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
