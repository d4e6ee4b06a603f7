# Each target makes what it needs (a virtual environment in .venv) and is quick when it is there.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.fcmae-ready
ENGINE := $(VENV)/.fcmae-minkowski
# more key=value pairs, such as: make quickstart ARGS="train.max_steps=20 output=runs/short"
ARGS ?=
# of what make faults draws
SEED := $(or $(SEED),$(shell date +%s))

# A file at a time in up to four processes, whose threads must not spin.
PYTEST = OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# What another processor rounds differently: vectors of 256 bits in torch and oneDNN, MKL's and numba's code for any
# processor (on AMD, MKL does not read MKL_ENABLE_INSTRUCTIONS), sums by one thread. What is compiled for one processor
# is kept apart: inductor takes the other's C++ for its own, and then gives numbers of 1e33.
OTHER_CPU = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR=COMPATIBLE \
  NUMBA_CPU_NAME=generic NUMBA_CACHE_DIR=$(abspath $(VENV))/other-cpu/numba \
  TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/other-cpu/inductor OMP_NUM_THREADS=1
NUMERIC = $(patsubst %,tests/test_%.py,ops layouts responses encoder networks roadmap decoder minkowski model masking hog v1 \
  weights weights_official weights_timm batches stats views visualize evaluate diagnose metrics \
  classification optim commands small_images any_images heads segments segmentation predict)

.PHONY: help quickstart minkowski test test-other-cpu fuzz kernels faults check bench docs
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / { printf "%-16s%s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

quickstart: $(READY)  ## pretrain on the photographs in docs/photos, and show where the pictures are
	@$(BIN)/python -m fcmae pretrain --config quickstart $(ARGS)
	@command -v fcmae > /dev/null || echo "  (which this finds: source $(BIN)/activate)"

minkowski: $(READY)  ## build and install MinkowskiEngine, for model.layout=minkowski
	@$(BIN)/python -m fcmae.encoder.install_minkowski $(ARGS)
	@touch $(ENGINE)

test: $(READY)  ## the test suite, and before it MinkowskiEngine where it can be built
	@test $(ENGINE) -nt $(READY) || { $(BIN)/python -m fcmae.encoder.install_minkowski && touch $(ENGINE); } || \
	  echo "going on without MinkowskiEngine: the last lines name what was not tested"
	@$(PYTEST)

test-other-cpu: $(READY)  ## the numeric tests, rounded as on another processor
	@$(OTHER_CPU) $(PYTEST) -m "not any_cpu" -k "not triton" $(NUMERIC)  # whose interpreter is NumPy's, the same on both

fuzz: $(READY)  ## thousands of malformed configurations, weights and images, others each time
	@FCMAE_FUZZ=1 $(PYTEST) tests/fuzz $(ARGS)

kernels: $(READY)  ## every kernel compiled for a Hopper GPU, its registers and instructions counted
	@FCMAE_KERNELS=1 $(PYTEST) tests/test_sm90.py $(ARGS)

faults: $(READY)  ## runs killed hundreds of times, and disks that fail; SEED=... for the same again
	@echo "make faults SEED=$(SEED)"
	@FCMAE_FAULTS=$(SEED) $(PYTEST) --dist worksteal --timeout 1800 tests/faults $(ARGS)

check: $(READY)  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)  ## the training step, layout by layout
	@$(BIN)/python benchmarks/train_step.py $(ARGS)

docs: $(READY)  ## the documentation site, in build/site
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet $(ARGS)
	@echo "build/site/index.html  to search in it, too: $(BIN)/python -m http.server --directory build/site"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: fcmae needs Python 3.11 or newer; name one with: make PYTHON=python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: no virtual environment could be made in $(VENV); on Debian: apt install python3-venv"; exit 2; }
	@echo "installing fcmae and what it needs into $(VENV) (torch is large: minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@$(BIN)/python -c 'import fcmae.data' 2> $(VENV)/import-error.log || \
	  { echo "error: $$(tail -n 1 $(VENV)/import-error.log)"; exit 2; }
	@touch $@
