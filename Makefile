# Two commands for a fresh machine with Python 3.11 or newer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: install quickstart test test-slow lint lock sbom audit clean

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

# Exact versions of what is installed here, for `pip install -r requirements.lock`.
lock: install
	$(BIN)/python .ci/supply.py lock > requirements.lock.new
	mv requirements.lock.new requirements.lock

# A software bill of materials (CycloneDX) of the same.
sbom: install
	mkdir -p build
	$(BIN)/python .ci/supply.py sbom > build/sbom.json

# Known vulnerabilities of the locked versions. Asks a public data base, so it needs the network.
audit: install
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python -m pip_audit --requirement requirements.lock --no-deps --disable-pip

clean:
	rm -rf $(VENV) build dist *.egg-info
