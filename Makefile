# Everything a user or CI does, in one word each. Only Python 3.11+ and make are needed.
#   make demo                               set-up, then the whole job on generated data
#   make demo EVENTS=path/to/log.parquet    the same job on your own log
#   make setup DEVICE=cuda                  build for GPU nodes on a machine without a GPU
PYTHON ?= python3
DEVICE ?=
EVENTS ?=
ARGS ?=

BIN := .venv/bin

# The repository root never goes on sys.path: its folder `kernels` would hide the package of that name.
export PYTHONSAFEPATH := 1

# Tests start several processes; more than one thread in each only makes them wait for one another.
TEST_THREADS := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help setup install demo test test-quick test-slow test-slurm test-image lint format typecheck bench bench-compile clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with the matching set of packages (nothing to do when it is there)
	@$(PYTHON) launch/setup_env.py $(if $(DEVICE),--device $(DEVICE))

install: setup  ## the same as setup

demo: setup  ## generate, prepare, train on 2 workers, evaluate, compare (EVENTS=log.parquet for your own)
	@$(BIN)/shardrec demo $(if $(EVENTS),--events "$(EVENTS)") $(ARGS)

test: setup  ## all tests that need no GPU
	$(TEST_THREADS) $(BIN)/pytest -m "not gpu and not soak and not slurm and not image" $(ARGS)

test-quick: setup  ## the tests that take seconds
	$(TEST_THREADS) $(BIN)/pytest -m "not gpu and not slow and not soak and not slurm and not image" $(ARGS)

test-slow: setup  ## a run on two workers, killed twenty times at random moments (ARGS=-s shows each)
	$(TEST_THREADS) $(BIN)/pytest -m soak tests/launch/test_elastic.py $(ARGS)

test-slurm: setup  ## training as a job of a real Slurm on this machine (root, Slurm)
	$(TEST_THREADS) $(BIN)/pytest -m slurm tests/launch/test_slurm.py $(ARGS)

test-image: setup  ## the Dockerfile's instructions in a fresh Debian, without Docker (root, debootstrap)
	$(TEST_THREADS) $(BIN)/pytest -m image tests/launch/test_dockerfile.py $(ARGS)

lint: setup  ## what CI checks besides the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: setup  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup  ## time each loss alone against its baselines; benchmarks/README.md has the other questions
	$(BIN)/python benchmarks/losses.py $(ARGS)

bench-compile: setup  ## build every Triton kernel for sm_80, sm_90 and sm_100 and count what it uses
	$(BIN)/python benchmarks/compile_kernels.py $(ARGS)

clean:  ## forget the environment and what the demo wrote
	rm -rf .venv demo .pytest_cache .mypy_cache .ruff_cache
