# Two commands, each complete on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test figures clean

quickstart: $(STAMP)  ## edit the packaged model with a stream of edits and print the table
	$(BIN)/editkit fit -c experiments/quickstart.yaml --run.overwrite true

test: $(STAMP)  ## lint, types, tests with coverage, notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest --cov --cov-report=term:skip-covered --cov-fail-under=90

figures: $(STAMP)  ## measure the README's table again (about 10 minutes)
	$(BIN)/python experiments/figures.py

clean:
	rm -rf $(VENV) runs

# The pinned set.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
