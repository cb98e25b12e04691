# Development commands; `make help` lists them. Every target first sets up the environment it needs.
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(IS_SUPPORTED)' 2>/dev/null && echo $$p && break; done)
GIVEN := $(filter command environment,$(firstword $(origin PYTHON)))
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup run test test-all check bench cluster-up cluster-status cluster-down clean tools docs study
.DEFAULT_GOAL := help

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

tools:
	@test -n "$(PYTHON)" || { echo "lmu-dist needs Python 3.11 or 3.12 and found neither; install one, or run make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c '$(IS_SUPPORTED)' 2>/dev/null || { echo "lmu-dist needs Python 3.11 or 3.12, and $(PYTHON) is none of them ($$($(PYTHON) -V 2>&1 | head -1)); run make PYTHON=/path/to/python3.12"; exit 1; }
	@test -z "$(GIVEN)" -o ! -x $(BIN)/python || test "$$($(PYTHON) -V | cut -d. -f1,2)" = "$$($(BIN)/python -V | cut -d. -f1,2)" || { echo "$(VENV) has $$($(BIN)/python -V), and $(PYTHON) is $$($(PYTHON) -V); run make clean first, or leave PYTHON out"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot create virtual environments; install its venv package (apt-get install python3-venv)"; exit 1; }
	@! command -v nvidia-smi >/dev/null || $(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || { echo "$(PYTHON) has no C headers (Python.h), with which Triton compiles for the GPU; install them (apt-get install python3-dev)"; exit 1; }
	@command -v g++ >/dev/null || { echo "lmu-dist needs g++: it compiles the LMU's kernels, without which the LMU is several times slower; install it (apt-get install g++)"; exit 1; }

setup: $(if $(GIVEN),tools) $(STAMP) ## create the virtual environment .venv with the exact versions of requirements.lock

$(STAMP): pyproject.toml requirements.lock
	@$(MAKE) --no-print-directory tools
	@echo "installing into $(VENV), this takes some minutes ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

run: setup ## run a small scaling study on this machine (24 cells on Ray, ZeRO 1, MLflow) and write its report
	$(BIN)/lmu-dist ladder jobs/quickstart.yaml --report report

test: setup ## run the fast tests in three processes, 10 to 17 minutes on two cores
	$(BIN)/pytest -m 'not slow' -n 3

test-all: setup ## run all tests, also the slow ones
	$(BIN)/pytest

check: setup ## check format, lint, types, import rules and known vulnerabilities of dependencies
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/audit.py

docs: setup ## regenerate docs/configuration.md from the comments in lmu_dist/config
	$(BIN)/python docs/make_configuration.py

study: setup ## make figures, numbers and text of docs/study again from its tables of records
	$(BIN)/python docs/study/make.py

bench: setup ## measure speed and memory, as tables and JSON; OUT=bench.json SECTIONS="mixers head" BASE=REV DEVICE=cuda
	$(BIN)/python benchmarks/speed.py $(SECTIONS) --json $(or $(OUT),bench.json) $(if $(BASE),--base $(BASE)) $(if $(DEVICE),--device $(DEVICE))

cluster-up: setup ## start Ray nodes, with a token, and MLflow on this machine and print what to export; NODES=2 CPUS=1
	@$(BIN)/lmu-dist cluster up $(if $(NODES),--nodes $(NODES)) $(if $(CPUS),--cpus $(CPUS))

cluster-status: setup ## show the processes of that cluster
	@$(BIN)/lmu-dist cluster status

cluster-down: setup ## stop that cluster, and no other Ray on this machine
	@$(BIN)/lmu-dist cluster down

clean: ## delete the environment and caches; runs and records stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache
