# Two commands are enough on a fresh machine: `make run` and `make test`.
# They need Python 3.11 or newer, make and a compiler; no root.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
UV     := $(shell command -v uv 2>/dev/null)
# Test processes at once, and any more arguments for pytest: make test JOBS=0 ARGS='-k spool'
JOBS   ?= auto
ARGS   ?=
# How long to run, and how often to kill: make soak MINUTES=20, make kill-test KILLS=300,
# make fuzz-derived MUTANTS=5000
MINUTES ?= 20
KILLS  ?= 300
MUTANTS ?= 5000
# A folder of DICOM files to restore in place of the phantoms: make run SERIES=path, and with
# ARGS='--gates warn' also what a gate would hold
SERIES ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test unit soak kill-test kill-test-pipeline bench bench-ledger fuzz fuzz-derived input-table lint check format docs reference lock clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv and install the project with everything it may use

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the packages into $(VENV) (some minutes the first time)"
ifeq ($(UV),)
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[all]'
else
	@VIRTUAL_ENV=$(abspath $(VENV)) $(UV) pip install --quiet -c constraints.txt -e '.[all]'
endif
	@touch $@

run: setup  ## the main job: send, restore and deliver a CT, a PET and an MR series
	@$(BIN)/python -m examples.main_job $(if $(SERIES),--series "$(SERIES)") $(ARGS)

test: setup  ## every tier of tests; a peer that is not installed skips with its name
	@$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

unit: setup  ## the unit tests alone
	@$(BIN)/python -m pytest tests/unit $(ARGS)

soak: setup  ## MINUTES of traffic, faults and rude peers; memory must stay
	DICOM_NODE_TEST_SOAK_MINUTES=$(MINUTES) \
	  $(BIN)/python -m pytest tests/integration/test_receive_soak.py -m soak $(ARGS)

kill-test: setup  ## kill the receive process KILLS times under senders; nothing may be lost
	DICOM_NODE_TEST_KILLS=$(KILLS) $(BIN)/python -m pytest tests/integration/test_receive_killed.py $(ARGS)

kill-test-pipeline: setup  ## kill any role KILLS times while series pass through; the end stays the same
	DICOM_NODE_TEST_PIPELINE_KILLS=$(KILLS) \
	  $(BIN)/python -m pytest tests/integration/test_end_to_end_killed.py $(ARGS)

bench: setup  ## C-STORE receivers side by side; ARGS=--quick takes three minutes
	$(BIN)/python -m benchmarks.bench_receive $(ARGS)

bench-ledger: setup  ## the ledger at 100,000 instances, SQLite and PostgreSQL; ARGS=--quick
	.ci/postgres $(BIN)/python -m benchmarks.bench_ledger $(ARGS)

fuzz: setup  ## coverage-guided fuzzing for MINUTES; findings go to build/fuzz
	$(BIN)/python -m tests.fuzz.run --minutes $(MINUTES) $(ARGS)

fuzz-derived: setup  ## MUTANTS mutants of each data set and odd headers through restoration; goes on where it was stopped
	$(BIN)/python -m tests.conformance.fuzz --each $(MUTANTS) $(ARGS)
	DICOM_NODE_TEST_EXAMPLES=$(MUTANTS) \
	  $(BIN)/python -m pytest tests/conformance/test_properties.py -o timeout=0

input-table: setup  ## write docs/input-table.md from the shared series and those by code
	$(BIN)/python -m tests.conformance.input_table \
	  $(or $(DIFFCODE_TEST_DATA),../shared/data)/dicom docs/input-table.md

lint: setup  ## lint, layout, types, layers, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

check: lint  ## lint and the unit tests
	$(BIN)/python -m pytest -q tests/unit tests/docs $(ARGS)

format: setup  ## let ruff lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup  ## build the documentation into docs/_build/html
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

reference: setup  ## write the pages and the configuration that are made from the program
	$(BIN)/python docs/reference.py

lock:  ## renew constraints.txt (needs uv on PATH)
	@head -3 constraints.txt > constraints.new
	@uv pip compile --universal --python-version 3.11 --all-extras --no-annotate --no-header \
	  --no-emit-index-url --quiet setup.cfg -o - >> constraints.new
	@mv constraints.new constraints.txt

clean:  ## remove what was built here; .venv stays
	rm -rf build dist docs/_build .mypy_cache .ruff_cache .pytest_cache .hypothesis htmlcov .coverage*
