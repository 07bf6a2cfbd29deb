# `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: setup demo test test-slow lint clean

setup: $(STAMP)
	@$(BIN)/kka setup

# The lock file holds the versions that were tested together; pyproject.toml says why some are pinned.
$(STAMP): pyproject.toml requirements/lock.txt
	@echo "Setting up: about 1.6 GB of packages and 0.4 GB of models, 5 to 10 minutes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint requirements/lock.txt --editable ".[dev]"
	@touch $@

demo: setup
	@echo "Running the demo: about 15 minutes on two cores, 1 GB of disk, no network, no data."
	$(BIN)/kka run configs/demo.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The fast suite, with the style, types and import rules.
test: setup lint
	$(BIN)/python -m pytest -m "not slow and not chaos"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not chaos"

clean:
	rm -rf $(VENV) build *.egg-info
