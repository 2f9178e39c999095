# Two commands a newcomer needs: `make run` (a model trains while a worker is killed) and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: install run test test-nightly test-torches test-gpu lint types unit tools lock clean

install: $(STAMP)

# torch first and alone: a CPU build at hand is taken as it is, and where none is the registry's build brings its
# own CUDA packages. Everything else is pinned by version and hash in requirements.lock.
$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; try make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

run: install
	$(BIN)/orchestrator run examples/quickstart.yaml --fault step=20,worker=1,kind=kill

test: install lint types unit

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# Two lanes, each with its share of the processors (tests/conftest.py); in the order of collection, so that what takes
# long is begun first.
LANES := -n 2 --dist loadscope --no-loadscope-reorder

unit: install tools
	$(BIN)/python -m pytest $(LANES)

# What takes long and differs little from what every run tries: hours. Before a release, with `test-torches`.
test-nightly: install tools
	$(BIN)/python -m pytest $(LANES) -m nightly

# The oldest torch that machines with GPUs are found to have, and the newest that there is.
TORCHES ?= 2.11.0 2.14.1

test-torches: install
	set -e; for version in $(TORCHES); do sh tests/with_torch.sh $$version; done

# On a machine with a GPU: about 20 minutes; figures are left in gpu-figures/ (docs/gpu.md). Needs torch, numpy, xxhash
# and pytest of the Python that is in use, so that it can be run where this package is not installed.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

test-gpu:
	$(GPU_PYTHON) -m pytest -m gpu -s tests/gpu

# A browser and Prometheus for the tests that use them; without them those are skipped, and say so.
tools:
	@sh tests/tools.sh

# Pins every dependency but torch (see above) for all platforms and Pythons from 3.11 on.
lock:
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	    --no-emit-index-url --no-emit-find-links --extra dev --no-emit-package torch --no-emit-package triton \
	    $$($(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-annotate --no-header pyproject.toml \
	       | sed -n 's/^\(\(nvidia\|cuda\)-[a-z0-9-]*\)==.*/--no-emit-package \1/p') \
	    --output-file requirements.lock pyproject.toml

clean:
	rm -rf $(VENV) .venv-torch-* build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
