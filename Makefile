# Everything a person types. Each step leaves a stamp behind when it is done, so a second run does only what changed and
# an interrupted one goes on where it stopped.
PYTHON ?= python3
VENV   ?= .venv
# The CPU build of torch. Plain `torch` is a CUDA build of several gigabytes on most machines.
TORCH  ?= torch==2.13.0
PROMPT ?= The capital of France is Paris, and the capital of Germany is

BIN     := $(VENV)/bin
SOURCES := pyproject.toml setup.py $(wildcard tools/*.py) $(shell find csrc -type f)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | expand -t 12

demo: $(VENV)/.installed ## install, fetch a small model, quantise it to 4 bits (once), and generate
	$(BIN)/teco-kernels demo "$(PROMPT)"

test: $(VENV)/.test-tools ## install, then run the whole test suite
	$(BIN)/python -m pytest -q

verify: $(VENV)/.installed ## hold every operator against its reference on this machine
	$(BIN)/teco-kernels verify

bench: $(VENV)/.test-tools ## time every operator beside the machine's measured ceilings
	$(BIN)/teco-kernels bench --json bench.json --png bench.png

quality: $(VENV)/.test-tools ## quantise the small model in many ways and measure what each costs (docs/quality.md)
	$(BIN)/python bench/quality.py

lint: $(VENV)/.lint-tools ## ruff, mypy, clang-format: report only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

format: $(VENV)/.lint-tools ## ruff and clang-format: rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h')

clean: ## remove what was built here (the cache of models stays)
	rm -rf build $(VENV) python/teco_kernels/*.so python/*.egg-info

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(BIN)/python -m pip install -q -e '.[text]'
	touch $@

$(VENV)/.test-tools: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[test]'
	touch $@

$(VENV)/.lint-tools: $(VENV)/.test-tools
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

.PHONY: help demo test verify bench quality lint format clean
