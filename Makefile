# The whole project in a few words: `make help`. Every target sets up the environment it needs.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup run test test-all check bench cluster-up cluster-status cluster-down clean tools
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

tools:
	@test -n "$(PYTHON)" || { echo "lmu-dist needs Python 3.11 or 3.12 and found neither; install one, or say make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; install its venv package (apt-get install python3-venv)"; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "$(PYTHON) has no C headers (Python.h); install them (apt-get install python3-dev)"; exit 1; }
	@command -v g++ >/dev/null || { echo "lmu-dist needs g++, with which DeepSpeed compiles its CPU collectives; install it (apt-get install g++)"; exit 1; }

setup: tools $(STAMP) ## virtual environment in .venv with the exact versions of requirements.lock

$(STAMP): pyproject.toml requirements.lock
	@$(MAKE) --no-print-directory tools
	@echo "installing into $(VENV), some minutes ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

run: setup ## a small scaling study on this machine: 16 cells on Ray, ZeRO 1, MLflow; and its report
	$(BIN)/lmu-dist ladder jobs/quickstart.yaml
	$(BIN)/lmu-dist report quickstart -o report

test: setup ## tests, some twenty minutes on two cores
	$(BIN)/pytest -m 'not slow'

test-all: setup ## also the slow tests
	$(BIN)/pytest

check: setup ## format, lint, types, import rules, known holes
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/audit.py

bench: setup ## speed and memory, as JSON and tables; OUT=bench.json SECTIONS="mixers head" BASE=REV DEVICE=cuda
	$(BIN)/python benchmarks/speed.py $(SECTIONS) --json $(or $(OUT),bench.json) $(if $(BASE),--base $(BASE)) $(if $(DEVICE),--device $(DEVICE))

cluster-up: setup ## Ray nodes, a token and MLflow on this machine; NODES=2 CPUS=1; what to export is printed
	@$(BIN)/lmu-dist cluster up $(if $(NODES),--nodes $(NODES)) $(if $(CPUS),--cpus $(CPUS))

cluster-status: setup ## what runs of it
	@$(BIN)/lmu-dist cluster status

cluster-down: setup ## ends it, and no other Ray on this machine
	@$(BIN)/lmu-dist cluster down

clean: ## removes the environment and caches; runs and records stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
