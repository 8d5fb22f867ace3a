# One door to the project: `make demo`, `make test`, `make check`. Everything is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUTPUT ?= autoplace-demo
PACKAGES := envs agents zoo

.PHONY: help setup demo test check format format-check lint types links clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | column -t -s "$$(printf '\t')"

setup: $(STAMP)  ## Create .venv and install autoplace with its development tools

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "autoplace needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)  ## Tune a BERT encoder on this machine's devices and write plan, report and MLflow run
	$(BIN)/autoplace tune examples/bert.py:build --output $(DEMO_OUTPUT)

test: $(STAMP)  ## Run the tests: those that calculate on all cores, then those that time things, one by one
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m beside
	$(BIN)/python -m pytest -m "not beside"

check: format-check lint types test  ## Format, lint, types, tests

format: $(STAMP)  ## Rewrite the sources in the house format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(STAMP)
	$(BIN)/ruff format --check .

lint: $(STAMP)  ## Lint the sources
	$(BIN)/ruff check .

types: $(STAMP) links  ## Check the types
	$(BIN)/python -m mypy

# The packages envs, agents and zoo are installed inside autoplace; type checkers see that mapping through links.
links:
	rm -rf build/types && mkdir -p build/types/autoplace
	for entry in autoplace/*; do ln -s "../../../$$entry" "build/types/autoplace/$${entry##*/}"; done
	for package in $(PACKAGES); do ln -s "../../../$$package" "build/types/autoplace/$$package"; done

clean:  ## Remove what was built or installed
	rm -rf $(VENV) build dist *.egg-info $(DEMO_OUTPUT) .pytest_cache .mypy_cache .ruff_cache .hypothesis
