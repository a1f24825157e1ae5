# Every target sets up what it needs in .venv; a second run finds the stamp there and starts at once. A failed install leaves no stamp.
#   make demo    train the tiny flavour on real clips, on the CPU, from download to sample
#   make test    the test suite
#   make lint types reference clean
#   make screenshots   pictures of the docs, by the tests that open the pages; as they are with Debian's chromium and fonts-noto-core
# TORCH="torch==2.12.1" installs another torch, PYTHON=python3.12 uses another interpreter, WORKERS=1 tests in one process.

SHELL := /bin/bash
TORCH ?= torch==2.13.0
WORKERS ?= auto
BIN := .venv/bin
DISTRIBUTIONS := core plugins/ltxvideo2 plugins/offload plugins/regularizers
PROJECTS := pyproject.toml $(addsuffix /pyproject.toml,$(DISTRIBUTIONS))
# A pyenv shim exists for versions that are not active, so each candidate is asked, not only looked up.
PYTHON ?= $(shell for name in python3 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)

# The tests' and the demo's tensors are tiny: a second thread waits for the first more than it computes.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test screenshots lint types reference reference-check clean

install: .venv/development

.venv/python: Makefile
	@if [ -z "$(PYTHON)" ]; then echo "No Python >= 3.11 with venv and ensurepip found; name one with make PYTHON=..." >&2; exit 3; fi
	$(PYTHON) -m venv .venv
	@touch $@

# torch alone first: what comes after must not choose another build of it.
.venv/runtime: .venv/python $(PROJECTS)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet $(addprefix -e ,$(DISTRIBUTIONS))
	@touch $@

# Development tools stand in pyproject.toml only; the extras of core are needed by tests of what uses them.
.venv/development: .venv/runtime
	$(BIN)/pip install --quiet -e 'core[torchao,quanto]' -r \
		<($(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["dev"], sep="\n")')
	@touch $@

demo: .venv/runtime
	$(BIN)/python examples/demo/prepare.py
	rm -rf examples/demo/output
	$(BIN)/tuner train --config examples/demo/config.json

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests examples/plugins

screenshots: install
	SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/integration/test_pages_in_a_browser.py

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

reference: install
	$(BIN)/python -m tuner.cli.reference

reference-check: install
	$(BIN)/python -m tuner.cli.reference --check

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -rf $(addprefix examples/demo/,media clips checkpoint cache output dataset.json)
