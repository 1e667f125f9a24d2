# make demo    set up where needed, then train a network without backprop
# make test    set up where needed, then run every test
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := setup.py $(shell find csrc -type f)
STAMPS := build/stamps

.PHONY: help demo test lint build bench clean
help:
	@echo "make demo | test | lint | build | bench | clean"

$(STAMPS)/venv: requirements.txt
	@mkdir -p $(STAMPS)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(STAMPS)/build: $(STAMPS)/venv $(SOURCES)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

build: $(STAMPS)/build

demo: build
	$(PY) -m frog_cuda demo

test: build
	$(PY) -m pytest -q

bench: build
	$(PY) benchmarks/run.py

# The last line compiles csrc into a folder of its own with warnings as errors.
lint: $(STAMPS)/venv
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp')
	$(VENV)/bin/mypy
	FROG_CUDA_WERROR=1 $(PY) setup.py --quiet build_ext --build-lib build/lint/lib --build-temp build/lint/temp

clean:
	rm -rf build frog_cuda/*.so *.egg-info
