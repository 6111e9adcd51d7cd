# Each target makes the virtual environment and installs what it needs; a stamp file remembers that it did.
# Another environment: make test VENV=/path. Another interpreter: make test PYTHON=python3.12.

VENV ?= .venv
PYTHON ?= python3
RESULTS ?= results
WORKERS ?= 2
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BASELINES := $(VENV)/.baselines
PIP := $(BIN)/python -m pip --disable-pip-version-check
PINNED := --quiet --constraint constraints.txt
SMOKE := outputs/smoke
# gcc 12 compiles llama.cpp's AMX kernels so that they crash; a mapped file does not use them (docs/log.md)
LLAMA_CPP_FLAGS := $(if $(filter x86_64,$(shell uname -m)),-DCMAKE_C_FLAGS=-mno-amx-int8 -DCMAKE_CXX_FLAGS=-mno-amx-int8)

.DEFAULT_GOAL := help
.PHONY: help install demo test wheel lint format types docs notebooks smoke agreement models reproduce soak soak-serve fuzz baselines clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## the virtual environment, with everything the other targets need (some minutes, once)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ..." if sys.version_info < (3, 11) else 0)'
	@echo "installing into $(VENV): some minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --quiet --upgrade pip
	@$(PIP) install $(PINNED) --editable '.[ggml,serve,bench,dev]'
	@touch $@

demo: $(INSTALLED) ## a real model in less memory than it needs, then FlexInfer against stock transformers (5 min)
	$(BIN)/python scripts/demo.py

test: $(INSTALLED) ## all tests, WORKERS files at a time (2)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile

wheel: $(INSTALLED) ## a wheel, into an empty environment with the core dependencies alone, and run there (2 min)
	$(BIN)/python scripts/check_wheel.py

lint: $(INSTALLED) ## format and lint, notebooks too
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

format: $(INSTALLED) ## fix what lint finds, where a machine can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(INSTALLED) ## static types
	$(BIN)/mypy flexinfer experiments scripts tests/stress

docs: $(INSTALLED) ## the site of docs/ in build/site; a broken link is an error
	@$(PIP) install $(PINNED) --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(INSTALLED) ## run the notebooks again: use, and the figures from the records in RESULTS (results)
	FLEXINFER_RESULTS=$(abspath $(RESULTS)) $(BIN)/python -m jupyter nbconvert --log-level WARN --to notebook --execute --inplace notebooks/*.ipynb

smoke: $(INSTALLED) $(BASELINES) ## a small experiment, and the notebooks on its records (3 min after install and baselines)
	rm -rf $(SMOKE)
	$(BIN)/python scripts/run.py +exp=smoke results_dir=$(SMOKE)
	FLEXINFER_RESULTS=$(abspath $(SMOKE)) $(BIN)/python -m jupyter nbconvert --log-level WARN --to notebook --execute --output-dir $(SMOKE)/notebooks $(filter-out notebooks/use.ipynb,$(wildcard notebooks/*.ipynb))

reproduce: $(INSTALLED) $(BASELINES) ## every experiment that the notebooks draw, on this machine: goes on where it was stopped (hours; LIST=1 says how many)
	$(BIN)/python scripts/reproduce.py --results-dir $(RESULTS) $(if $(LIST),--list)

agreement: $(INSTALLED) $(BASELINES) ## FlexInfer beside llama.cpp on a real GGUF file: top tokens, divergence, perplexity (1 min)
	$(BIN)/python -m experiments.agreement --record $(RESULTS)/quality/agreement.jsonl

models: $(INSTALLED) ## every architecture of transformers, tiny: which run goes into docs/models.md (an hour, resumable)
	$(BIN)/python -m experiments.architectures --record $(RESULTS)/quality/architectures.jsonl
	$(BIN)/python -m experiments.architectures --record $(RESULTS)/quality/architectures.jsonl --page docs/models.md

soak: $(INSTALLED) ## random models, budgets and calls in control groups of exactly the budget (N=1000: an hour, resumable)
	$(BIN)/python -m tests.stress.soak $(or $(N),1000) --record $(RESULTS)/reliability/soak.jsonl

soak-serve: $(INSTALLED) ## the server in such a group, eight clients at once, some of them rude (MINUTES=30)
	$(BIN)/python -m tests.stress.serve --minutes $(or $(MINUTES),30) --record $(RESULTS)/reliability/serve.jsonl

fuzz: $(INSTALLED) ## hostile headers, indices, configurations, GGUF files and records (SECONDS=3600: an hour each)
	@$(PIP) install $(PINNED) --editable '.[fuzz]'
	@for target in header index config gguf records; do \
		$(BIN)/python -m tests.stress.fuzz $$target --seconds $(or $(SECONDS),60) --record $(RESULTS)/reliability/fuzz.jsonl || exit 1; \
	done

baselines: $(BASELINES) ## the systems compared with: llama.cpp (compiled, 4 min), AirLLM, oLLM

$(BASELINES): $(INSTALLED)
	@echo "compiling llama.cpp for this CPU: 4 minutes on two cores"
	@CMAKE_ARGS="$(LLAMA_CPP_FLAGS)" $(PIP) install $(PINNED) --editable '.[baselines]'
	@$(PIP) install --quiet --no-deps ollm
	@touch $@

clean: ## delete the environment, caches and outputs; checkpoints: scripts/clean.py
	rm -rf .venv build dist outputs multirun *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
