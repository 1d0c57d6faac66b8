# SPDX-License-Identifier: Apache-2.0
# Each target does all the set-up that it needs. PIP_ARGS: more arguments for pip.
PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin/python
TYPES := .venv/types

.PHONY: setup demo test lint types unit conformance

setup:
	@PIP_ARGS='$(PIP_ARGS)' $(PYTHON) .ci/setup

demo: setup
	$(BIN) examples/quickstart.py

test: lint unit

lint: setup types
	$(BIN) -m ruff check .
	$(BIN) -m ruff format --check .

# mypy reads a folder of links that has the layout of the installed package.
types: setup
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/vllm_unmask
	@ln -s $(CURDIR)/vllm_plugin/* $(CURDIR)/grammar $(CURDIR)/kernels \
		$(CURDIR)/patches $(TYPES)/vllm_unmask/
	MYPYPATH=$(TYPES) $(BIN) -m mypy -p vllm_unmask

# Two at a time: the engines of the tests have one thread each.
unit: setup
	$(BIN) -m pytest -q -n 2 --dist loadfile tests --ignore=tests/conformance

conformance: setup
	$(BIN) -m pytest -q tests/conformance
