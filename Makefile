# make search: from an empty machine to a Pareto report.   make test: everything that must hold.   make docs: the site.
PYTHON ?= python3
VENV ?= .venv
# The CPU build suffices. On Linux the plain name pulls CUDA's packages too; see docs/install.md.
TORCH ?= torch==2.13.0
STUDY ?= emoji
BIN := $(VENV)/bin

# make gpu-check: DEVICE=cpu SMALL=1 tries it without a GPU; OUT names the folder to send, LIMIT the seconds of it all.
DEVICE ?= cuda
OUT ?= runs/gpu-check
WHEELS ?= gpu-wheels
# The machine's own Python where the environment of `make test` is not there: a GPU machine may have no network.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: search test test-slow lint format docs tools gpu-check gpu-wheels clean
.DEFAULT_GOAL := search

search: $(VENV)/.ready
	$(BIN)/archsearch search $(STUDY)

test: $(VENV)/.ready-dev lint tools
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --durations 10

test-slow: $(VENV)/.ready-dev tools
	$(BIN)/python -m pytest -m "slow and not gpu" --durations 10

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes docs/reference and builds the site into build/docs/site; a warning is an error.
docs: $(VENV)/.ready-dev
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/build.py

# The report's tests drive Chromium, some of the studies' start a PostgreSQL server; without one they are skipped, saying
# so. Continuous integration installs both.
tools:
ifdef CI
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium)
	ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || command -v postgres >/dev/null || \
		(apt-get update -qq && apt-get install -y -qq postgresql)
endif

$(VENV)/.ready: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,docs,postgresql]'
	touch $@

gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check --device $(DEVICE) --out $(OUT) $(if $(SMALL),--small) \
		$(if $(LIMIT),--limit $(LIMIT)) $(if $(wildcard $(WHEELS)/*.whl),--wheels $(WHEELS)) $(if $(ONLY),--only $(ONLY))

gpu-wheels: $(VENV)/.ready-dev
	$(BIN)/python -m benchmarks.gpu_check.wheels $(WHEELS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
