# Two commands for a fresh machine with Python 3.11 or newer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: install quickstart test test-slow lint clean

# torch first: this pin is the CPU build where an index offers one, and everything else accepts it as it is.
$(BIN)/posttrain: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

install: $(BIN)/posttrain

# Trains a small model, improves it by reinforcement learning with a verifier, and compares both on unseen problems.
quickstart: install
	$(BIN)/posttrain run recipes/quickstart.yaml

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'slow and not gpu'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info
