# make demo | test | test-all | soak | lint | schema | bench | docs | dist | clean. The first call makes .venv; a change of pyproject.toml brings it up to date.
PYTHON ?= python3
WORKERS ?= 2
BIN := .venv/bin
BENCHMARKS := predict train_step modules two_stage operators evaluate bootstrap loader scale

.DEFAULT_GOAL := help
.PHONY: help demo test test-all soak lint schema bench docs dist clean

help:
	@echo "make demo   generate images, train a small detector on them, score it and draw its detections"
	@echo "make test   the test suite, WORKERS=$(WORKERS) tests at a time"
	@echo "make test-all  the suite and its long tests: killed runs, several processes, every detector and export"
	@echo "make soak   the tests that take hours in all: all combinations, long fuzzing, memory, large annotations, killed processes"
	@echo "make lint   ruff and mypy"
	@echo "make schema  write the JSON schemas of configs and ablation tables, and the tables of their keys in docs"
	@echo "make bench  the benchmarks, JSON each"
	@echo "make docs   build the documentation site into build/site, without network; a warning is an error"
	@echo "make dist   build the source distribution and the wheel into dist/ and check their metadata"
	@echo "make clean  remove caches and build products; .venv, demos and runs stay"

demo: .venv/.ready
	$(BIN)/fusedet demo

# one thread per worker: small tensors gain nothing from more, and workers would fight for the cores; bytecode is kept
# whatever the environment says: without it, each process compiles tests and sources for 8 seconds
test: .venv/.ready
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-all: .venv/.ready
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not soak"

# one after the other: they measure memory and time
soak: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m soak tests

lint: .venv/.ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

schema: .venv/.ready
	$(BIN)/python docs/declarations.py

bench: .venv/.ready
	@for name in $(BENCHMARKS); do echo "== $$name" >&2; $(BIN)/python benchmarks/$$name.py || exit 1; done

docs: .venv/.ready
	$(BIN)/python -m sphinx -W --keep-going -q -c docs . build/site
	@echo "build/site/index.html"

dist: .venv/.ready
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fusedet needs Python 3.11 or newer, and '$(PYTHON)' is not: name one that is, e.g. make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || rm -rf .venv
	@if uv --version >/dev/null 2>&1; then \
	  { test -x $(BIN)/python || uv venv --python "$$(command -v $(PYTHON))" .venv; } && uv pip install --python $(BIN)/python -e ".[dev]"; \
	else \
	  { test -x $(BIN)/python || $(PYTHON) -m venv .venv; } && $(BIN)/python -m pip install -e ".[dev]"; \
	fi
	@touch $@
