# make demo       train a tiny model with a learned mixture, in about a minute
# make test       the quick tests: every module, every recipe, a resume, two processes; a few minutes on two cores
# make test-all   every test except those with a marker (see pyproject.toml); half an hour at most
# make results    docs/tables/: every table and plot, from the results of runs that docs/data/ keeps
# make lint       ruff      make types    mypy
#
# Needs only Python 3.11, or a newer one for which the torch of constraints.txt has a wheel. PYTHON=... sets the interpreter,
# VENV=... the folder of the environment, ARGS=... are arguments of pytest (make test ARGS="-k tune_cli").

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
DEMO := yaml/tiny_adapt_planned.yaml

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs --numprocesses 2 --dist loadfile

.PHONY: demo test test-all results lint types clean

demo: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/tune run adapt_full_finetune --config $(DEMO)
	@echo "Results: $$(sed -n 's/^output_dir: *\([^ ]*\).*/\1/p' $(DEMO))/"

# Only the marker `slow` decides in which of the two a test runs.
test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

results: $(VENV)/.installed
	$(BIN)/python benchmarks/records.py tables

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py tune_cli_ext.pth
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "Python 3.11 or newer is needed, and '$(PYTHON)' is not one: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable '.[report]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
