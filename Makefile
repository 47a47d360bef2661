# make demo   sets up, runs the main job, says where the page is
# make compare  sets up, compares pooled, federated and local training, says where the page is
# make ablation sets up, trains what differential privacy imposes rung by rung (36 trainings, hours), says where the page is
# make test   sets up, runs every test            (make test PYTEST_ARGS="-k config")
# make check  lint, types, import arrows, fast tests
# make bench  speed and memory of this machine
# make clean  removes .venv and caches; runs/ stays

PYTHON3 ?= python3
VENV    := .venv
PYTHON  := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
PYTEST_ARGS ?=
# Half of the suite waits for other processes; files keep their tests together for the fixtures that they share.
PYTEST_WORKERS ?= 3
# One thread a worker: with one for each core, three workers spend half of their time on waiting for one another.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(PYTEST_WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo compare ablation test check lint bench clean

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "fedgan needs Python 3.11 or newer, and $(PYTHON3) is not: make PYTHON3=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON3) -m venv --clear $(VENV) \
	  || { echo "no virtual environment could be made. Debian/Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "installing fedgan and what it needs into $(VENV) (a few minutes the first time) ..."
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' \
	  || { echo "the packages could not be installed, pip says why above. A first installation wants about 10 GB free (torch brings CUDA);" \
	    "free here and where downloads are unpacked:" >&2; df -h . "$${TMPDIR:-/tmp}" >&2; exit 1; }
	@touch $@

demo: setup
	@$(VENV)/bin/fedgan demo

compare: setup
	@$(VENV)/bin/fedgan compare simulations/three_hospitals_compare.toml

ablation: setup
	@$(VENV)/bin/fedgan compare simulations/dp_ablation.toml

test: setup
	$(PYTEST) $(PYTEST_ARGS)

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

check: lint
	$(PYTEST) -m "not slow" -q $(PYTEST_ARGS)

bench: setup
	$(PYTHON) -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
