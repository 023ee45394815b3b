# Everything a user or CI does, in one word each. Only Python 3.11+ and make are needed.
#   make demo                               set-up, then the whole job on generated data
#   make demo EVENTS=path/to/log.parquet    the same job on your own log
#   make setup DEVICE=cuda                  build for GPU nodes on a machine without a GPU
#   make setup TORCH=2.14                   another set of packages than the default
PYTHON ?= python3
DEVICE ?=
TORCH ?=
EVENTS ?=
ARGS ?=

# Where this file is: nothing, or the folder before its name in `make -f FOLDER/Makefile`.
ROOT := $(patsubst ./,,$(dir $(lastword $(MAKEFILE_LIST))))
BIN := $(ROOT).venv/bin
# What works on the whole repository starts there.
AT_ROOT := $(if $(ROOT),cd $(ROOT) && )

# The path goes to the shell as it was typed, whatever characters are in it.
export SHARDREC_EVENTS := $(value EVENTS)

# The repository root never goes on sys.path: its folder `kernels` would hide the package of that name.
export PYTHONSAFEPATH := 1

# Tests start several processes; more than one thread in each only makes them wait for one another.
TEST_THREADS := OMP_NUM_THREADS=1
# The files of tests are shared out among this many processes; 0 runs them in pytest's own.
TEST_PROCESSES ?= 2
SHARED_OUT := -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup install demo test test-quick test-slow test-slurm test-image test-spark lint format docs lock bench bench-compile verdict-gpu verdict-gpu-train clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## make .venv with the matching set of packages (nothing to do when it is there)
	@$(PYTHON) $(ROOT)launch/setup_env.py --venv $(ROOT).venv $(if $(DEVICE),--device $(DEVICE)) $(if $(TORCH),--torch $(TORCH))

install: setup  ## the same as setup

demo: setup  ## generate, prepare, train on 2 workers, evaluate, compare (EVENTS=log.parquet for your own)
	@$(BIN)/shardrec demo $${SHARDREC_EVENTS:+--events "$$SHARDREC_EVENTS"} $(ARGS)

test: setup  ## all tests that need no GPU
	$(AT_ROOT)$(TEST_THREADS) .venv/bin/pytest $(SHARED_OUT) -m "not gpu and not soak and not slurm and not image and not spark" $(ARGS)

test-quick: setup  ## the tests that take seconds
	$(AT_ROOT)$(TEST_THREADS) .venv/bin/pytest $(SHARED_OUT) -m "not gpu and not slow and not soak and not slurm and not image and not spark" $(ARGS)

test-slow: setup  ## a run killed 100 times (ARGS='-s --kills 20': fewer, each shown); 5,000 spoiled files; 2.3 GB of item ids
	$(AT_ROOT)$(TEST_THREADS) .venv/bin/pytest -m soak tests/launch/test_elastic.py \
		tests/pipeline/test_spoiled_files.py tests/pipeline/test_long_text.py $(ARGS)

test-slurm: setup  ## training as a job of a real Slurm on this machine (root, Slurm)
	$(AT_ROOT)$(TEST_THREADS) .venv/bin/pytest -m slurm tests/launch/test_slurm.py $(ARGS)

test-image: setup  ## the Dockerfile's instructions in a fresh Debian, without Docker (root, debootstrap)
	$(AT_ROOT)$(TEST_THREADS) .venv/bin/pytest -m image tests/launch/test_dockerfile.py $(ARGS)

test-spark: setup  ## prepare on Spark, in one process and on clusters (Java, pip install pyspark)
	$(AT_ROOT)$(TEST_THREADS) .venv/bin/pytest -m spark tests/pipeline/test_spark.py \
		tests/pipeline/test_spark_clusters.py $(ARGS)

lint: setup  ## what CI checks besides the tests
	$(AT_ROOT).venv/bin/ruff check .
	$(AT_ROOT).venv/bin/ruff format --check .
	$(AT_ROOT).venv/bin/mypy
	$(AT_ROOT).venv/bin/codespell

format: setup  ## let ruff rewrite what it can
	$(AT_ROOT).venv/bin/ruff check --fix .
	$(AT_ROOT).venv/bin/ruff format .

docs: setup  ## build the documentation into site/; a broken link is an error
	$(AT_ROOT).venv/bin/mkdocs build --strict $(ARGS)

lock: setup  ## take the releases that are in .venv as the tested ones
	$(AT_ROOT).venv/bin/pip freeze --exclude-editable \
		| grep -vE '^(torch|torchrec|triton|fbgemm.*|nvidia-.*|cuda-.*|setuptools)(==| @)' \
		> launch/constraints/others.txt

bench: setup  ## time each loss alone against its baselines; benchmarks/README.md has the other questions
	$(AT_ROOT).venv/bin/python benchmarks/losses.py $(ARGS)

bench-compile: setup  ## build every Triton kernel for sm_80, sm_90 and sm_100 and count what it uses
	$(AT_ROOT).venv/bin/python benchmarks/compile_kernels.py $(ARGS)

verdict-gpu:  ## check and time every kernel on one GPU in 8 minutes; needs torch and Triton alone
	$(AT_ROOT)PYTHONPATH=src:benchmarks $(PYTHON) benchmarks/verdict_gpu.py $(ARGS)

verdict-gpu-train:  ## train each loss for 30 steps on one GPU: checkpoint, resume, profile, evaluate, export
	$(AT_ROOT)PYTHONPATH=src:benchmarks $(PYTHON) benchmarks/verdict_gpu_train.py $(ARGS)

clean:  ## forget the environment and what the demo wrote
	$(AT_ROOT)rm -rf .venv demo site .pytest_cache .mypy_cache .ruff_cache
