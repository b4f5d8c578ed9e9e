# Two commands, each complete on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test figures soak browser clean

quickstart: $(STAMP)  ## edit the packaged model with a stream of edits and print the table
	$(BIN)/editkit fit -c experiments/quickstart.yaml --run.overwrite true

test: $(STAMP) browser  ## lint, types, tests with coverage, notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist worksteal --cov --cov-report=term:skip-covered --cov-fail-under=90

figures: $(STAMP)  ## measure the table of plain fine-tuning again (about 10 minutes)
	$(BIN)/python experiments/figures.py

soak: $(STAMP)  ## kill runs at random moments, feed them bad input, and count (minutes)
	$(BIN)/python benchmarks/soak.py --kills 8 --signals KILL,TERM --jobs 2
	$(BIN)/pytest -n auto tests/test_malformed.py

# Opens the report in tests. Debian's root gets it here; elsewhere those tests say what they miss.
browser:
	@for name in chromium chromium-browser google-chrome; do \
	  if command -v $$name >/dev/null; then exit 0; fi; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  { apt-get update && apt-get install -y --no-install-recommends chromium; } >/dev/null 2>&1; \
	fi; \
	command -v chromium >/dev/null || echo "no Chromium here: tests that open the report skip"

clean:
	rm -rf $(VENV) runs

# The pinned set.
$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
