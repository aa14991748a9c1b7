# Every target makes its own virtual environment in .venv and installs into it only what it needs.
# An environment is used again until setup.py or pyproject.toml changes.
#
#   make test PYTHON=python3.12                                     another interpreter
#   make test ERNIE45_NO_PADDLE=1                                   .venv already holds a paddlepaddle-gpu wheel
#   make bench BENCH_OPTIONS="--peer transformers"    also what `ernie45 bench --help` lists
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make parity    torch without CUDA

PYTHON ?= python3
VENV := .venv
BENCH_MODEL := build/random-0.3b
RUN := $(VENV)/bin/python

export ERNIE45_NO_PADDLE
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Paddle warns about a missing compiler cache whenever it is imported.
export PYTHONWARNINGS := ignore:No ccache found:UserWarning

.DEFAULT_GOAL := help
.PHONY: help demo test parity lint bench check-cuda clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(VENV)/.installed-core ## ask the embedded small model three questions
	$(RUN) examples/demo.py

test: $(VENV)/.installed-test ## run the tests that need nothing but this package
	$(RUN) -m pytest -m "not parity" tests

parity: $(VENV)/.installed-test $(VENV)/.installed-parity ## compare with transformers (installs torch)
	$(RUN) -m pytest -m parity tests

lint: $(VENV)/.installed-test ## check style, format and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(VENV)/.installed-core $(VENV)/.installed-bench $(BENCH_MODEL)/config.json ## measure this machine, into docs/
	$(RUN) tools/bench.py --model $(BENCH_MODEL) --output docs $(BENCH_OPTIONS)

check-cuda: $(VENV)/.installed-core ## compile the CUDA operators for Ampere and Hopper; needs nvcc, but no GPU
	$(RUN) tools/check_cuda.py

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# config.json is the last thing that the tool writes: an interrupted checkpoint is written again.
$(BENCH_MODEL)/config.json: configs/ernie-4.5-0.3b.json | $(VENV)/.installed-core
	$(RUN) tools/make_random_checkpoint.py --config $< --output $(BENCH_MODEL)

# pip is the last thing that venv puts in place: an interrupted creation is started again.
$(VENV)/bin/pip:
	$(PYTHON) -m venv --clear $(VENV)

$(VENV)/.installed-core: setup.py pyproject.toml | $(VENV)/bin/pip
	$(RUN) -m pip install --quiet --quiet --editable .
	@touch $@

$(VENV)/.installed-%: setup.py pyproject.toml | $(VENV)/bin/pip
	$(RUN) -m pip install --quiet --quiet --editable '.[$*]'
	@touch $@
