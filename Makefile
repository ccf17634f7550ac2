# Two commands set everything up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/installed
# Each worker takes whole files, because tests of one file share what is slow to make.
PYTEST := $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: quickstart test test-all lint install
.DELETE_ON_ERROR:

# One pip command, so that torch is resolved once: an unpinned torchvision would bring another.
$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed; name it with PYTHON=python3.x" >&2; exit 2; }
	@start=$$(date +%s); \
	$(PYTHON) -m venv $(VENV) && \
	$(BIN)/python -m pip install --disable-pip-version-check --quiet \
	  --constraint constraints.txt --editable '.[dev,cuda13]' && \
	echo $$(( $$(date +%s) - start )) > $@ && echo "installed in $$(cat $@) s"

install: $(STAMP)

quickstart: $(STAMP)
	@$(BIN)/python launch/quickstart.py

test: $(STAMP)
	$(PYTEST) -m "not slow and not slurm"

# Each slow test starts processes of its own, so two at a time fill two cores.  The cluster's
# fixtures own addresses and ports of the machine: one after the other.
test-all: test
	$(PYTEST) --maxprocesses 2 -m "slow and not slurm"
	$(BIN)/python -m pytest -m slurm

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
