# Two commands make everything: `make repro` and `make test`. Both create the environment on first use.

PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: repro test lint benchmarks gpu faults recover env

repro: env  ## run the default pipeline: reports/ and data/
	dvc repro

test: env  ## the test suite
	pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: env  ## style and formatting
	ruff check .
	ruff format --check .

benchmarks: env  ## layers, peers and tokenization at the paper's sizes, into reports/benchmarks/ and the reports
	dvc repro benchmarks/dvc.yaml
	dvc repro --single-item --force report_cached_inference report_dwr report_dagformer summarize

gpu: env  ## what takes a GPU, by gpu/params.yaml, into reports/gpu.md; what is done is not run again
	@python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"make gpu: PyTorch {torch.__version__} finds no \
	CUDA device: nvidia-smi shows whether there is one, and up to which version of CUDA its driver goes")'
	dvc repro --keep-going gpu/dvc.yaml || { cd gpu && python ../benchmarks/report_gpu.py; exit 1; }  # what there is so far

faults: env  ## what kills, damage, odd input and full disks do, into docs/reliability.md: most of an hour (KILLS=108 CASES=720)
	python faults/corruption.py --workspace .scratch/faults --cases $(or $(CASES),720)
	python faults/inputs.py --workspace .scratch/faults --cases $(or $(CASES),720)
	$$(unshare --user --map-root-user --mount echo unshare --user --map-root-user --mount 2>/dev/null) \
	  python faults/situations.py --workspace .scratch/faults
	python faults/repeat.py --workspace .scratch/faults
	python faults/kills.py --workspace .scratch/faults --kills $(or $(KILLS),108)
	python faults/page.py

recover:  ## mend what a kill can leave: a cut dvc.lock, stale locks, a detached HEAD, half-written files
	@sh recover.sh

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dynaroute needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
