# Every target creates and reuses .venv by itself: a fresh clone with Python 3.11+, git and make is enough.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,$(shell \
	$(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(p))))
BIN := .venv/bin
# Processes that share the tests, a file to each at a time; every one of them takes a gigabyte or two.
WORKERS ?= 2
# Python keeps what it compiled, whatever the caller's setting: without it every start compiles torch anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-all test-quick test-versions fuzz soak lint bench bench-full docs wheel-test release-check clean
.DEFAULT_GOAL := help

help:
	@echo "make demo        train the example on generated scenes and print its table (under 5 minutes)"
	@echo "make test        lint, types and all tests, doctests and the built wheel (under 15 minutes)"
	@echo "make test-all    the same and what is left out there: more options of what it tests at some (under 20 minutes)"
	@echo "make test-quick  the quick tests of the library alone (under 90 seconds)"
	@echo "make test-versions  the quick tests of the library on the oldest torch, NumPy and einops that it allows (minutes, downloads them)"
	@echo "make fuzz        10,000 random calls of the library against the oracles (minutes); FUZZ=500 for fewer, SEED=7 for other ones"
	@echo "make soak        a training killed at 30 random moments (minutes); KILLS=5 for fewer, SEED=7 for other ones"
	@echo "make lint        ruff and mypy"
	@echo "make bench       speed and memory of the library on this machine (minutes)"
	@echo "make bench-full  the same with every variant and size, and accuracy; writes benchmarks/results, tables and plots (under an hour)"
	@echo "make docs        build the documentation"
	@echo "make wheel-test  install the wheel into an empty environment and run the README there (minutes, downloads torch)"
	@echo "make release-check  build what a release uploads into dist/ and check it"
	@echo "make clean       remove .venv and everything built"

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "dlprop needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv

# Not compiled: Python does that to what is imported, and most of these packages' files never are.
.venv/installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable ".[$*]"
	@touch $@

# Tools alone: the archives are built in an environment of their own, which needs neither torch nor the library.
.venv/installed-release: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "build>=1.2" "twine>=6.1"
	@touch $@

# The floors of the dependencies in pyproject.toml, as they are: the oldest versions that the library promises to work with.
OLDEST := $(shell sed -n '/^dependencies/s/>=/==/gp' pyproject.toml | tr -d '[]",' | cut -d = -f 2-)

.venv-oldest/installed: pyproject.toml
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[test]" $(OLDEST)
	@touch $@

demo: .venv/installed-example
	$(BIN)/python -m examples.derprop_voc demo

test: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m ""

test-quick: .venv/installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" --ignore tests/example --ignore tests/pages

test-versions: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" --ignore tests/example --ignore tests/pages

fuzz: .venv/installed-dev
	$(BIN)/python -m pytest -v tests/fuzz.py

soak: .venv/installed-dev
	$(BIN)/python -m pytest -v tests/example/soak.py

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-bench
	$(BIN)/python -m benchmarks

bench-full: .venv/installed-bench
	$(BIN)/python -m benchmarks --full --save

docs: .venv/installed-docs
	$(BIN)/python -m sphinx -W --keep-going docs docs/_build/html

wheel-test: .venv/installed-dev
	$(BIN)/python -m pytest tests/pages/empty_environment.py

release-check: .venv/installed-release
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf .venv .venv-oldest build dist docs/_build docs/auto_gallery docs/sg_execution_times.rst .mypy_cache .pytest_cache .ruff_cache .hypothesis runs
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
