# make            lists what there is
# A fresh machine needs Python 3.11 and make; everything else is installed into .venv from constraints.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
AT_ONCE ?= 2
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-cluster test-gpu lint types format clean

help:  ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.installed  ## .venv with the exact versions of constraints.txt

# The stamp is touched last: an install that was cut short is done again.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or newer is needed, {sys.executable} is {v[0]}.{v[1]}: make PYTHON=python3.11")'
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: setup  ## COCO folder -> shards -> training -> AP -> registry -> HTTP, on this machine (KEEP=1 leaves it serving)
	@$(BIN)/python infra/demo.py $(if $(KEEP),--keep)

test: setup  ## the tests, some ten minutes on 2 cores, two at a time (AT_ONCE=1: one)
	@$(BIN)/python -m pytest -q -n $(AT_ONCE) --max-worker-restart=0

test-slow: setup  ## the long tests
	@$(BIN)/python -m pytest -q -m slow -o faulthandler_timeout=3600

test-cluster: setup  ## a cluster of three machines made of Linux namespaces, machines lost in it
	@bash tests/cluster/run.sh $(BIN)/python

test-gpu: setup  ## the tests and figures that need a GPU, 14 minutes at most
	@bash tests/benchmarks/on_gpu.sh $(BIN)/python

lint: setup  ## style of the whole tree
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: setup  ## types of hrnet_core, pipelines and serve
	@$(BIN)/mypy

format: setup  ## let ruff format the tree
	@$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean:  ## remove what the demo and the tests left here (not .venv)
	@rm -rf demo .pytest_cache .mypy_cache .ruff_cache *.egg-info
