# make help            names the targets for users
# Nothing is needed but git, make and Python 3.12: each target makes its own virtual environment.
# PYTHON=/path/to/python takes an interpreter whose packages are already there instead (a machine without network).

VENV := .venv
OLD_JAX := 0.11.2
OLD_JAX_DIR := .jax-$(OLD_JAX)
JOBS ?= 2
PYTEST_ARGS ?=
# Python keeps what it has compiled, also where the environment forbids that: without it each of the hundreds of
# processes that the tests start compiles our modules anew, and pytest rewrites the asserts of every test file.
export PYTHONDONTWRITEBYTECODE :=

ifdef PYTHON
PY := $(PYTHON)
VENV_FOR = $(PY) -c 'import sys; sys.exit(sys.version_info < (3, 12) and "PYTHON must be 3.12 or newer")'
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
else
PY := $(VENV)/bin/python
VENV_FOR = @sh tools/make_venv.sh $(VENV)
endif

# Two worker processes where pytest-xdist is there; without it, or with JOBS=1, one process does the same tests.
XDIST = $$(test $(JOBS) != 1 && $(PY) -c 'import xdist' 2>/dev/null && echo "-n $(JOBS) --dist worksteal")
PYTEST = $(PY) -m pytest -q -rfEs $(XDIST) $(PYTEST_ARGS)

.PHONY: help demo test train-example examples test-whole test-x64 test-jax-0.11 gpu-test lint format docs package clean
.PHONY: venv-for-ci venv-for-x64

# The lines that begin with "## ", and what stands there.
help:
	@echo "make demo, or make with another target. Each makes the environment $(VENV) when it first needs it;"
	@echo "PYTHON=/path/to/python takes an interpreter that has the packages already."
	@sed -n 's/^## /  /p' Makefile

# Every extra that a target of .ci/run asks for, at once: targets that run side by side must not install.
venv-for-ci:
	$(VENV_FOR) cli test torch examples dev docs

# What the tests with 64-bit jax need, which do without PyTorch.
venv-for-x64:
	$(VENV_FOR) cli test examples

## demo            aligns two random routings of real sizes, checks them against a plain loop
demo:
	$(VENV_FOR) cli
	$(PY) -m moe_align_jax.cli demo

# Checkpoints and pictures go into trained/; a second run goes on from there. TRAIN_ARGS="--steps 1000".
## train-example   trains a small MoE language model (examples/train_moe.py), a minute on a CPU
train-example:
	$(VENV_FOR) examples
	$(PY) examples/train_moe.py --out trained $(TRAIN_ARGS)

# The examples but for train_moe.py, as small as they come, on this machine's GPU or CPU. The load's picture goes
# into trained/.
## examples        runs the other examples
examples:
	$(VENV_FOR) torch examples
	mkdir -p trained
	set -e; for example in moe_layer equinox_moe "expert_parallel_layer --devices 8" \
		"expert_rebalancing --picture trained/load.png" "fp8_expert_parallel_layer --devices 8" transformers_experts; do \
		set -- $$example; name=$$1; shift; echo "== $$name $$*"; $(PY) examples/$$name.py "$$@"; done

# TURN=0 and TURN=1 each run half of the longest functions, both together all: CI takes one by the commit.
TURN ?=
PART = $(BRIEF) $(if $(TURN),--turn $(TURN)) --part

# Every test function: see tests/parts.py for which of its cases.
## test            runs every test function on this machine's CPU or GPU
test:
	$(VENV_FOR) cli test torch examples
	$(QUICK_XLA) $(PYTEST) $(PART) newest-jax

# Compiling is what takes the time, and results on a CPU do not depend on how far LLVM optimises, on how many
# pieces of a program it takes side by side, nor on the source lines that each operation could name.
QUICK_XLA := XLA_FLAGS="--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1" \
  JAX_TRACEBACK_IN_LOCATIONS_LIMIT=0

# A quarter of the examples that `make test-whole` draws for each property.
BRIEF := --hypothesis-profile=brief

# Every case of the suite, where `make test`, `test-jax-0.11` and `test-x64` share out a part of them.
## test-whole      runs every case of them: nearly an hour of CPU time
test-whole:
	$(VENV_FOR) cli test torch examples
	$(QUICK_XLA) $(PYTEST)

# Which test functions cost much, into tests/costs.txt, from the CPU time of one case in four.
.PHONY: test-costs
test-costs:
	$(VENV_FOR) cli test torch examples
	$(QUICK_XLA) $(PY) -m pytest -q -rfEs --sample 4 --write-costs $(PYTEST_ARGS)

# The library's tests with 64-bit jax: every output must still be int32.
## test-x64        the library's tests with 64-bit jax
test-x64:
	$(VENV_FOR) cli test torch examples
	$(QUICK_XLA) JAX_ENABLE_X64=1 $(PYTEST) $(PART) x64

# The oldest jax we support, laid over the same environment: PyTorch is not installed twice.
WITH_OLD_JAX = PYTHONPATH=$(CURDIR)/$(OLD_JAX_DIR):$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
.PHONY: old-jax
old-jax:
	$(VENV_FOR) cli test torch examples
	@test -e $(OLD_JAX_DIR)/.complete || { rm -rf $(OLD_JAX_DIR) && \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
	    --target $(OLD_JAX_DIR) jax==$(OLD_JAX) jaxlib==$(OLD_JAX) && touch $(OLD_JAX_DIR)/.complete; }

## test-jax-0.11   the tests with the oldest jax that is supported
test-jax-0.11: old-jax
	$(WITH_OLD_JAX) $(QUICK_XLA) $(PYTEST) --expect-jax $(OLD_JAX) $(PART) oldest-jax

# The oldest transformers whose experts run by ours, with what it asks for otherwise than the newest one.
OLD_TRANSFORMERS := 5.17.0
OLD_TRANSFORMERS_DIR := .transformers-$(OLD_TRANSFORMERS)
.PHONY: test-transformers
test-transformers:
	$(VENV_FOR) cli test torch examples
	@test -e $(OLD_TRANSFORMERS_DIR)/.complete || { rm -rf $(OLD_TRANSFORMERS_DIR) && \
	  $(PY) -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
	    --target $(OLD_TRANSFORMERS_DIR) transformers==$(OLD_TRANSFORMERS) huggingface-hub==1.33.0 \
	    httpx==0.28.1 httpcore==1.0.9 certifi idna && touch $(OLD_TRANSFORMERS_DIR)/.complete; }
	PYTHONPATH=$(CURDIR)/$(OLD_TRANSFORMERS_DIR):$(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH)) \
	  EXPECT_TRANSFORMERS=$(OLD_TRANSFORMERS) \
	  $(PY) -m pytest -q -rfEs $(PYTEST_ARGS) tests/models/test_transformers_experts.py

# On a machine with a Hopper GPU, or several. SHARDS processes at once.
SHARDS ?= 4
## gpu-test        every test for a GPU: on a machine with a Hopper GPU; SHARDS=8 for more processes
gpu-test:
	$(VENV_FOR) cli test torch examples
	sh tools/gpu_test.sh $(PY) $(SHARDS) $(PYTEST_ARGS)

## lint            ruff, pyright, and a user's file with mistakes that pyright must find
lint:
	$(VENV_FOR) cli test torch examples dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) tools/check_user_types.py

## format          what ruff can repair by itself
format:
	$(VENV_FOR) dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The site of docs/, into site/: every warning is an error.
## docs            the site of docs/, into site/
docs:
	$(VENV_FOR) docs
	$(PY) tools/build_docs.py

# A wheel and an sdist in dist/, as they would be uploaded; tests/meta/test_package.py looks into them.
## package         a wheel and an sdist, into dist/
package:
	$(VENV_FOR) dev
	rm -rf dist
	$(PY) -m hatchling build -d dist
	$(PY) -m twine check --strict dist/*

## clean           removes what the targets have made, the environment too
clean:
	rm -rf dist site .cache $(VENV) $(OLD_JAX_DIR) $(OLD_TRANSFORMERS_DIR) .cuda-plugin-* .no-gpu

# Kernel forms to machine code by the newest jax's compiler, one in KERNEL_SAMPLE, and one in ten by the oldest
# one's, too. Needs a C compiler and no GPU. Both CUDA plugins (400 MB each, unpacked) are installed into the
# checkout the first time.
# Seconds that a kernel may take to compile count the waiting for a core, too: five times the limit here.
export COMPILE_PATIENCE ?= 5
KERNEL_SAMPLE ?= 1
COMPILED_MODULES := masked_quant rows router vllm_aligned peer_rows recording exchanges layer matmul
.PHONY: compile-kernels compile-kernels-$(OLD_JAX) compile-kernels-newest resolve
## compile-kernels every form of the kernels to machine code, without a GPU
compile-kernels: compile-kernels-newest compile-kernels-$(OLD_JAX)

compile-kernels-newest:
	$(VENV_FOR) cli test torch
	$(PY) -m tests.no_gpu.compile --jobs $(JOBS) --sample $(KERNEL_SAMPLE)
	$(PY) -m tests.no_gpu.several --sample $(KERNEL_SAMPLE) $(COMPILED_MODULES)

# One kernel in ten: a compiler that differs at all differs in those.
compile-kernels-$(OLD_JAX): old-jax
	$(WITH_OLD_JAX) $(PY) -m tests.no_gpu.compile --jobs $(JOBS) --sample 10
	$(WITH_OLD_JAX) $(PY) -m tests.no_gpu.several --sample 10 $(COMPILED_MODULES)

# jax[cuda13] and torch install side by side: a dry run of the resolver, which writes nothing.
resolve:
	$(VENV_FOR) cli test torch dev
	sh tools/check_resolves.sh $(PY)
