# Each target makes what it needs (a virtual environment in .venv) and is quick when it is there.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.fcmae-ready
# more key=value pairs, such as: make quickstart ARGS="train.max_steps=20 output=runs/short"
ARGS ?=

.PHONY: quickstart minkowski test check bench
.DELETE_ON_ERROR:

quickstart: $(READY)  ## pretrain on the photographs in docs/photos, and show where the pictures are
	@$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 \
	  --mixed_precision no --dynamo_backend no pretrain.py --config configs/quickstart.yaml $(ARGS)

minkowski: $(READY)  ## build and install MinkowskiEngine, for model.layout=minkowski
	@$(BIN)/python -m fcmae.encoder.install_minkowski $(ARGS)

test: $(READY)  ## the test suite, a file at a time in up to four processes, whose threads must not spin
	@OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

check: $(READY)  ## lint, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)  ## the training step, layout by layout
	@$(BIN)/python benchmarks/train_step.py $(ARGS)

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
