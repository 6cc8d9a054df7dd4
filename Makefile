# The environment, the checks and the demo. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# a test runs on one thread, so the processors share the tests
PYTEST := $(BIN)/python -m pytest -q -n logical --maxprocesses 8 --dist worksteal
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input install --quiet -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint bench artefacts clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

# torch first and pinned: a plain `torch` would pull gigabytes of CUDA libraries where a CPU wheel serves
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fastdiff needs Python 3.11 or newer: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[plots,test]' ruff mypy
	@touch $@

demo: $(STAMP)  ## the shipped model: solvers compared, one figure, one table
	$(BIN)/fastdiff demo

test: $(STAMP)  ## the tests without the slow ones
	$(PYTEST) -m "not slow"

test-all: $(STAMP)  ## all tests
	$(PYTEST)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)  ## pytest-benchmark suites
	$(BIN)/python -m pytest -q benches

artefacts: $(STAMP)  ## the measured tables and figures of the README, made anew
	$(BIN)/python -m fastdiff.cli.artefacts

clean:  ## everything that can be made again
	rm -rf $(VENV) build dist *.egg-info out .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
