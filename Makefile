# make serve   a server with the two demo models on port 8000
# make test    everything that CI runs
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
CONFIG ?= serve_configs/dev.yaml
START  := $(shell date +%s)
took    = echo "make $@ took $$(( $$(date +%s) - $(START) )) s"

.PHONY: serve test check fast install clean

serve: install
	@echo "== ready to start after $$(( $$(date +%s) - $(START) )) s; starting $(CONFIG)"
	@$(BIN)/ballast serve $(CONFIG)

test: check
	@echo "== tests"
	@$(BIN)/python -m pytest; code=$$?; $(took); exit $$code

check: install
	@echo "== format, lint, types, layers"
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && $(BIN)/mypy && $(BIN)/lint-imports --no-logo

# The tests that need no engine and no Ray: half a minute.
fast: install
	@$(BIN)/python -m pytest -m "not vllm and not ray and not serve and not gpu" -q

install: $(STAMP) .models/demo/ballast_demo.json

$(STAMP): pyproject.toml constraints.txt
	@echo "== environment in $(VENV): about 2 minutes and 4 GB the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHON=$(BIN)/python sh scripts/install.sh
	@touch $@

.models/demo/ballast_demo.json: $(wildcard cluster/demo_*.py) | $(STAMP)
	@$(BIN)/ballast demo-model .models/demo
	@touch $@

clean:
	rm -rf $(VENV) .models .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
