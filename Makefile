# `make` alone prints the targets. Every target that needs packages sets up .venv by itself, from nothing.
PYTHON ?= python3
# `make test CONSTRAINTS=` takes the newest versions instead of the tested ones.
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
RUN ?= runs/instruct

VENV := .venv
BIN := $(VENV)/bin
# The stamps name what is installed; they are out of date when the requirements are.
REQUIREMENTS := setup.py pyproject.toml $(CONSTRAINTS)
# One thread per test process: the models are tiny, and more threads than cores make them slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help quickstart install style check test test-slow card clean

help:  ## print this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-12s %s\n", $$1, $$2}'

quickstart: $(VENV)/.installed-tiny  ## train the whole model small, from nothing, on this machine
	$(BIN)/soundwave quickstart

install: $(VENV)/.installed-dev  ## set up .venv with everything needed to develop

style: $(VENV)/.installed-dev  ## format, and mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: $(VENV)/.installed-dev  ## lint, format and types, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(VENV)/.installed-dev  ## run the default tests (offline, CPU)
	$(PYTEST) -n $(WORKERS)

test-slow: $(VENV)/.installed-dev  ## run the tests that take minutes or downloads
	$(PYTEST) -m slow

card: $(VENV)/.installed-dev  ## write the card of a stage again: make card RUN=runs/instruct
	$(BIN)/soundwave card $(RUN)

clean:  ## remove .venv, caches and builds
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed-%: $(REQUIREMENTS) | $(BIN)/pip
	$(BIN)/pip install $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e ".[$*]"
	@touch $@

$(BIN)/pip:
	@bash .ci/make_venv $(PYTHON) $(VENV)
