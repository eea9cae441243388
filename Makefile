# Two commands set up everything they need on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-all lint format ledger notebooks clean

# The environment is brought up to date where setup.cfg has changed.
$(VENV)/ready-%: setup.cfg pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	touch $@

demo: $(VENV)/ready-test
	$(BIN)/python -m experiments.split_mnist

test: $(VENV)/ready-test
	NPROC=16 CL_ZOO_TEST_CACHE="$(CURDIR)/$(VENV)/compilation-cache" $(BIN)/python -m pytest -q -n 2 -m "not long" --durations=10

test-all: $(VENV)/ready-test
	NPROC=16 CL_ZOO_TEST_CACHE="$(CURDIR)/$(VENV)/compilation-cache" $(BIN)/python -m pytest -q -n 2 --durations=20

lint: $(VENV)/ready-test $(VENV)/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ledger: $(VENV)/ready-test
	$(BIN)/python -m experiments.ledger

notebooks: $(VENV)/ready-test
	$(BIN)/python -m experiments.notebooks

clean:
	rm -rf $(VENV) build dist *.egg-info
