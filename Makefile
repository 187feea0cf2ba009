# Everything a newcomer runs. Each target sets up what it needs by itself.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= replay-out
DEMO ?= demo-run
WORKERS ?= 2
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: setup setup-dev demo demo-kafka test lint lock replay bench docs

setup: $(VENV)/.demo
setup-dev: $(VENV)/.dev

$(BIN)/uv: requirements-setup.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements-setup.txt
	touch $@

$(VENV)/.demo: $(BIN)/uv requirements.txt pyproject.toml
	@echo "Installing the demo's packages into $(VENV) (torch makes it about 6 GB)"
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -e .
	touch $@

$(VENV)/.dev: $(BIN)/uv requirements-dev.txt pyproject.toml
	@echo "Installing all packages and the checkers into $(VENV) (torch makes it about 6 GB)"
	$(BIN)/uv pip install --python $(BIN)/python --compile-bytecode --require-hashes -r requirements-dev.txt
	$(BIN)/uv pip install --python $(BIN)/python --no-deps -e .
	touch $@ $(VENV)/.demo $(VENV)/.kafka

$(VENV)/.kafka: $(VENV)/.demo
	$(BIN)/uv pip install --python $(BIN)/python -r pyproject.toml --extra kafka -c requirements-dev.txt
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/uv pip install --python $(BIN)/python -c requirements-dev.txt --group bench
	touch $@

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

# One process for each of two cores; a file's tests stay together, for they share models that are slow to make. Files go in their own order:
# by the number of their tests the few that take longest would come last, and one process would wait for the other.
test: lint
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report term

# The real daemon and a real node, on real decisions: a gain, a bad import that is rejected, a forced promotion that is taken back.
demo: setup
	$(BIN)/python -m daemon.demo --out $(DEMO) $(ARGS)

# The same over a real Kafka broker and on a real PostgreSQL server, which it starts and stops itself.
demo-kafka: $(VENV)/.kafka
	$(BIN)/python -m daemon.demo --kafka --out $(DEMO) $(ARGS)

# The loop on real decisions, replayed on a simulated clock: history to 2005, then the claims of 2006 and 2007.
replay: setup
	mkdir -p $(OUT)
	$(BIN)/python -m daemon.imr --years 2001-2005 $(OUT)/history.jsonl
	$(BIN)/python -m daemon.imr --years 2006-2007 $(OUT)/stream.jsonl
	$(BIN)/ratchet simulate --history $(OUT)/history.jsonl --stream $(OUT)/stream.jsonl --out $(OUT) --baselines

docs: setup-dev
	$(BIN)/python scripts/write_docs.py

# One resolution over all extras; requirements.txt is its part that the demo needs.
lock: $(BIN)/uv
	$(BIN)/uv pip compile pyproject.toml --all-extras --group dev --universal --generate-hashes \
	    --python-version 3.11 --no-emit-index-url --quiet $(LOCKFLAGS) -o requirements-dev.txt
	$(BIN)/uv pip compile pyproject.toml --extra train -c requirements-dev.txt --universal --generate-hashes \
	    --python-version 3.11 --no-emit-index-url --quiet $(LOCKFLAGS) -o requirements.txt

# Measure one thing against a baseline in the same run: make bench NAME=exam. Its closing line is kept, docs/benchmarks.md is made of it.
bench: setup-dev $(if $(filter training,$(NAME)),$(VENV)/.bench)
	@test -n "$(NAME)" || { echo "say which: make bench NAME=$$(ls benchmarks | sed -n 's/\.py$$//p' | grep -v -e __init__ -e figures -e contenders -e gpu | paste -sd'|')"; exit 2; }
	mkdir -p benchmarks/results
	set -o pipefail; $(BIN)/python -m benchmarks.$(NAME) $(ARGS) | tee benchmarks/results/.$(NAME).partial
	tail -n 1 benchmarks/results/.$(NAME).partial > benchmarks/results/$(NAME).json
	rm benchmarks/results/.$(NAME).partial
	$(BIN)/python scripts/write_benchmarks.py
