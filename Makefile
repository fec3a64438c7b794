# One word per job. `make` alone explains them. Settings live in the recipe, not here.
.PHONY: help setup train calibration export report run test test-arm64 docs check format lock bench bench-peers bench-quality clean

PYTHON ?= python3
RECIPE ?= train/recipes/solar.toml
JOBS ?= 4
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LOCK := requirements/workstation.txt
PEERS := build/peers

help:  ## explain the targets
	@echo "fieldfit: adapt a classifier to field images, prove it, run it on devices"
	@echo
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16 | sed 's/^/  make /'
	@echo
	@echo "  RECIPE=FILE   the recipe for train, calibration, export, report, run (now $(RECIPE))"
	@echo "  Start with:   make train export"

setup: $(READY)  ## create or update the environment in .venv (the other targets do this by themselves)

$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"The workstation needs Python 3.11 or newer, {sys.executable} is {v[0]}.{v[1]}; try: make PYTHON=python3.12 setup")'
	@test -x $(BIN)/python || { echo "Creating $(VENV)"; $(PYTHON) -m venv $(VENV); } || { echo "python3 -m venv failed; on Debian: apt install python3-venv" >&2; exit 1; }
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv || echo "uv is not to be had; going on with pip, which is slower"
	@echo "Installing the pinned packages (about 6 GB on disk with CUDA; half a minute with a fast line)"
	@if test -x $(BIN)/uv; then \
	    VIRTUAL_ENV=$(VENV) $(BIN)/uv pip sync --require-hashes $(LOCK); \
	else \
	    $(BIN)/python -m pip install --require-hashes -r $(LOCK); \
	fi
	@if test -x $(BIN)/uv; then \
	    VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install --quiet --no-deps --no-build-isolation --editable .; \
	else \
	    $(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .; \
	fi
	@touch $@

train: $(READY)  ## adapt the model to the field images of RECIPE
	@$(BIN)/python -m train "$(RECIPE)"

calibration: $(READY)  ## inspect the INT8 calibration of an exported RECIPE
	@$(BIN)/python -m calibration "$(RECIPE)"

export: $(READY)  ## prove the model in every precision and write the bundle
	@$(BIN)/python -m export "$(RECIPE)"

report: $(READY)  ## show the page that explains the last export of RECIPE
	@$(BIN)/python -m export report "$(RECIPE)" --open

run: $(READY)  ## classify a few held-out field images with the bundle
	@$(BIN)/python -m export "$(RECIPE)" --run

test: $(READY)  ## run all tests, JOBS at a time (4 suit two cores)
	@$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

test-arm64: $(READY)  ## replay a bundle on emulated aarch64 (Debian as root; minutes at first)
	@$(BIN)/python -m tests.arm64 --install $(ARM64) || test $$? -eq 77

docs: $(READY)  ## write the pages that are made from the code
	@$(BIN)/python docs/generate.py

check: $(READY)  ## lint, format, types and layers
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(READY)  ## format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY)  ## measure side by side and write benchmarks/results; ARGS=--quick shows it in minutes
	@$(BIN)/python -m benchmarks.run $(ARGS)

bench-peers: $(READY)  ## install what bench compares with, if wanted, into build/peers (about 6 GB)
	@test -x $(PEERS)/bin/python || $(BIN)/python -m venv $(PEERS)
	@if test -x $(BIN)/uv; then \
	    $(BIN)/uv pip install --quiet --python $(PEERS)/bin/python --require-hashes \
	        -r requirements/peers.txt; \
	else \
	    $(PEERS)/bin/python -m pip install --quiet --require-hashes -r requirements/peers.txt; \
	fi

bench-quality: $(READY)  ## measure quality: label budgets, DANN on digits, INT8 beside its peers (hours)
	@$(BIN)/python -m benchmarks.run adaptation dann quantization quality $(ARGS)

lock: $(READY)  ## renew the pinned, hashed requirements
	@$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --upgrade \
	    --generate-hashes --no-emit-index-url --no-annotate --no-header -q -o $(LOCK)
	@$(BIN)/uv pip compile requirements/peers.in --universal \
	    --python-version 3.11 --upgrade \
	    --generate-hashes --no-emit-index-url --no-annotate --no-header -q -o requirements/peers.txt
	@$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.10 --upgrade \
	    --fork-strategy requires-python \
	    --generate-hashes --no-emit-index-url --no-annotate --no-header -q -o requirements/device.txt

clean:  ## remove results and caches, keep the environment
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
