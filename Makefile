# make search: from an empty machine to a Pareto report.   make test: everything that must hold.
PYTHON ?= python3
VENV ?= .venv
# The CPU build suffices. On Linux the plain name pulls CUDA's packages too; see README, "Installing".
TORCH ?= torch==2.13.0
STUDY ?= emoji
BIN := $(VENV)/bin

.PHONY: search test test-slow lint format tools clean
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
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev,postgresql]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
