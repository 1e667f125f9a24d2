# make demo     set up where needed, then train a network without backprop
# make test     set up where needed, then run every test            ARGS="-k gram" chooses; ARGS=-n0 in one process
# make lint     ruff, clang-format, mypy, and csrc/ compiled with warnings as errors
# make build    the compiled libraries, in place
# make test-cuda-build   the CUDA kernels compiled (needs nvcc, no GPU), and every test beside a CUDA build of torch
# make bench    benchmarks, as a table with ratios
# make clean    all that was built; .venv and .venv-cuda stay
#
# PYTHON=python3.12 make demo   chooses the interpreter that .venv is made with
CHOSEN := $(PYTHON)
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
CSRC = $(shell find csrc tests/cuda_on_cpu -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Each of these files is written after the step has succeeded: an interrupted step is done again.
READY := $(VENV)/.requirements-installed
# With FROG_CUDA_WERROR=1 the ordinary build refuses warnings, and make lint needs no build of its own (.ci/run).
ifeq ($(FROG_CUDA_WERROR),1)
BUILT := build/.built-without-warnings
STRICT := $(BUILT)
else
BUILT := build/.built
STRICT := build/lint/.built
endif

# A process for each core; a file of tests stays in one of them, for what its tests share.
PYTEST := -q -n auto --dist loadfile

# A second environment and a copy of the sources, because the two builds of torch need libraries of their own.
CUDA_VENV := .venv-cuda
CUDA_READY := $(CUDA_VENV)/.requirements-installed
CUDA_TREE := build/cuda/tree

.PHONY: help build demo test test-cuda-build bench lint clean python
help:
	@sed -n 's/^# //p' Makefile

# The interpreter is looked at only where .venv is to be made, or where it was chosen by name.
python:
	@if test -n "$(CHOSEN)" || ! test -e $(READY); then \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	        { echo "frog_cuda: $(PYTHON) is not Python 3.10 or later; choose one: PYTHON=python3.12 make ..." >&2; exit 1; }; \
	    version='import sys; print("%d.%d" % sys.version_info[:2])'; wanted=$$($(PYTHON) -c "$$version"); \
	    found=$$($(PY) -c "$$version" 2>/dev/null || echo $$wanted); \
	    test $$found = $$wanted || \
	        { echo "frog_cuda: $(VENV) has Python $$found, not $$wanted: remove $(VENV) to have it made again" >&2; exit 1; }; \
	fi

$(READY): requirements.txt | python
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "frog_cuda: installing requirements.txt into $(VENV) (some minutes the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# Folders of csrc are listed too: their times change where a file comes or goes.
$(BUILT) build/lint/.built: $(READY) setup.py frog_cuda/_sources.py $(shell find csrc)

$(BUILT):
	@$(PY) setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@

build/lint/.built:
	@FROG_CUDA_WERROR=1 $(PY) setup.py --quiet build_ext --build-temp build/lint/temp --build-lib build/lint/lib
	@touch $@

# A library that was deleted is built again, whatever the times say.
ifeq ($(and $(wildcard frog_cuda/_C.*),$(wildcard frog_cuda/_host.*)),)
.PHONY: $(BUILT)
endif

build: $(BUILT)

demo: $(BUILT)
	@$(PY) -m frog_cuda demo

test: $(BUILT)
	@$(PY) -m pytest $(PYTEST) $(ARGS)

$(CUDA_READY): requirements.txt requirements-cuda.txt
	@$(CUDA_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(CUDA_VENV)
	@echo "frog_cuda: installing requirements-cuda.txt into $(CUDA_VENV) (gigabytes the first time)"
	@mkdir -p build/cuda && grep -v '^torch==' requirements.txt >build/cuda/requirements.txt
	@$(CUDA_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-cuda.txt -r build/cuda/requirements.txt
	@touch $@

# Objects of the last build stay in the tree; what has gone from the sources goes there too.
test-cuda-build: $(CUDA_READY)
	@mkdir -p $(CUDA_TREE) && find $(CUDA_TREE) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
	@tar -cf - --exclude=./.git --exclude='./.venv*' --exclude=./build --exclude='*.so' --exclude=__pycache__ . | tar -xf - -C $(CUDA_TREE)
	@cd $(CUDA_TREE) && export FROG_CUDA_BUILD=cuda TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-8.0;9.0}" && \
	    $(CURDIR)/$(CUDA_VENV)/bin/python setup.py --quiet build_ext --inplace
	@cd $(CUDA_TREE) && FROG_CUDA_ON_CPU_BUILD=$(CURDIR)/build/cuda_on_cpu $(CURDIR)/$(CUDA_VENV)/bin/python -m pytest $(PYTEST) $(ARGS)

bench: $(BUILT)
	@$(PY) benchmarks/run.py $(ARGS)

lint: $(READY)
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --quiet --check . || { $(PY) -m ruff format --check .; exit 1; }
	@$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(CSRC)
	@$(PY) -m mypy
	@$(MAKE) --no-print-directory $(STRICT)

clean:
	rm -rf build dist *.egg-info frog_cuda/*.so
