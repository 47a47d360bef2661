# make demo      sets up, trains three hospitals on phantoms, writes a report
# make compare   sets up, compares centralised, federated and local training
# make ablation  sets up, compares the parts of differential privacy (36 trainings, hours)
# make test      sets up, runs every test   (make test PYTEST_ARGS="-k config")
# make check     lint, types, import directions, fast tests
# make fuzz      30,000 damaged inputs of every reader
# make soak      100 rounds with a random death every five (a quarter of an hour)
# make docs      builds the documentation into build/site, fails on a warning
# make bench     speed and memory of this machine
# make lock      writes deploy/requirements.lock: the tested packages of the images, with hashes
# make clean     removes .venv, builds and caches; runs/ stays

PYTHON3 ?= python3
VENV    := .venv
PYTHON  := $(VENV)/bin/python
STAMP   := $(VENV)/.installed
DOCS    := $(VENV)/.installed-docs
PYTEST_ARGS ?=
# Half of the suite waits for other processes; a file's tests stay together for shared fixtures.
PYTEST_WORKERS ?= 3
# One thread per worker: with one per core, three workers spend half of their time waiting.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(PYTEST_WORKERS) --dist loadfile \
  --no-loadscope-reorder
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo compare ablation test fuzz soak check lint docs bench lock clean

help:
	@sed -n 's/^# \(make\)/\1/p' Makefile

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "fedgan needs Python 3.11 or newer: make PYTHON3=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON3) -m venv --clear $(VENV) || { \
	  echo "cannot create a virtual environment: apt install python3-venv" >&2; exit 1; }
	@echo "installing fedgan into $(VENV) (a few minutes the first time) ..."
	@$(PIP) --editable '.[dev]' || { \
	  echo "pip failed, see above. A first installation needs about 10 GB; free:" >&2; \
	  df -h . "$${TMPDIR:-/tmp}" >&2; exit 1; }
	@touch $@

demo: setup
	@$(VENV)/bin/fedgan demo

compare: setup
	@$(VENV)/bin/fedgan compare simulations/three_hospitals_compare.toml

ablation: setup
	@$(VENV)/bin/fedgan compare simulations/dp_ablation.toml

test: setup
	$(PYTEST) $(PYTEST_ARGS)

fuzz: setup
	FEDGAN_FUZZ=30000 $(PYTEST) --dist load -q tests/test_fuzz.py

soak: setup
	FEDGAN_SOAK=100 $(PYTEST) -n 0 -s tests/test_soak.py

lint: setup
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

check: lint
	$(PYTEST) -m "not slow" -q $(PYTEST_ARGS)

$(DOCS): $(STAMP)
	@$(PIP) --editable '.[docs]'
	@touch $@

# NO_MKDOCS_2_WARNING: mkdocs-material prints an advertisement otherwise.
docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(PYTHON) -m mkdocs build --strict --site-dir build/site

bench: setup
	$(PYTHON) -m benchmarks

# torch and torchvision come from an index of their own (FEDGAN_TORCH_INDEX): not in the file.
lock: setup
	@mkdir -p build
	@$(PYTHON) -m pip freeze --exclude-editable > build/tested.txt
	@$(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project'] \
	  ['dependencies'], sep='\n')" | sed 's/\[simulation\]//' > build/requirements.in
	@printf '%s; python_version < "3"\n' torch torchvision > build/without.txt
	$(VENV)/bin/uv pip compile --quiet --python-version 3.11 --generate-hashes --no-annotate \
	  --constraint build/tested.txt --override build/without.txt --no-emit-index-url \
	  --custom-compile-command "make lock" --output-file deploy/requirements.lock \
	  build/requirements.in

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
