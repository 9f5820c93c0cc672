# Two commands make everything: `make repro` and `make test`. Both create the environment on first use.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test lint benchmarks recover env

repro: env  ## run the default pipeline: reports/ and data/
	dvc repro

test: env  ## the test suite
	pytest

lint: env  ## style and formatting
	ruff check .
	ruff format --check .

benchmarks: env  ## layer benchmarks at the paper's sizes, into reports/benchmarks/
	dvc repro benchmarks/dvc.yaml

recover:  ## mend what a killed DVC can leave: an empty dvc.lock (which goes where git has none), a stale lock file
	for lock in dvc.lock corpora/dvc.lock; do \
		test -s $$lock || git checkout --quiet -- $$lock 2>/dev/null || rm -f $$lock; \
	done
	rm -f .dvc/tmp/rwlock .dvc/tmp/lock

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dynaroute needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
