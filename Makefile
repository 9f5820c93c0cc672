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
	dvc repro --single-item --force report_cached_inference
	dvc repro --single-item --force report_dagformer

gpu: env  ## what takes a GPU, by gpu/params.yaml, into reports/gpu.md; what is done is not run again
	@python -c 'import sys, torch; torch.cuda.is_available() or sys.exit(f"make gpu: PyTorch {torch.__version__} finds no \
	CUDA device: nvidia-smi shows whether there is one, and up to which version of CUDA its driver goes")'
	dvc repro --keep-going gpu/dvc.yaml || { cd gpu && python ../stages/report_gpu.py; exit 1; }  # what there is so far

faults: env  ## what kills, damage, odd input and full disks do, into docs/reliability.md: most of an hour (KILLS=108 CASES=720)
	python faults/corruption.py --workspace .scratch/faults --cases $(or $(CASES),720)
	python faults/inputs.py --workspace .scratch/faults --cases $(or $(CASES),720)
	$$(unshare --user --map-root-user --mount echo unshare --user --map-root-user --mount 2>/dev/null) \
	  python faults/situations.py --workspace .scratch/faults
	python faults/repeat.py --workspace .scratch/faults
	python faults/kills.py --workspace .scratch/faults --kills $(or $(KILLS),108)
	python faults/page.py

recover:  ## mend what a kill can leave: a cut dvc.lock (which goes where git has none), stale locks, a detached HEAD, half-written files
	@for lock in .scratch/running_*/lock gpu/.scratch/running_*/lock; do \
	  if [ -s "$$lock" ] && command -v flock >/dev/null && ! flock --timeout 60 "$$lock" true; then \
	    echo "$$lock: process $$(cat "$$lock") is at work: wait for it, or stop it"; exit 1; fi; done
	rm -f "$$(git rev-parse --git-path index.lock 2>/dev/null)" .dvc/tmp/rwlock .dvc/tmp/lock
	@# A killed `dvc exp run` leaves git without a branch, and its own experiment for the next one to run as well.
	@if ! git symbolic-ref --quiet HEAD >/dev/null && branch=$$(git rev-parse --symbolic-full-name '@{-1}' 2>/dev/null) && \
	  [ "$$branch" ] && tip=$$(git rev-parse "$$branch") && { [ "$$(git rev-parse HEAD)" = "$$tip" ] || \
	    [ "$$(git rev-parse --quiet --verify refs/exps/exec/EXEC_BASELINE)" = "$$tip" ]; }; then \
	    git symbolic-ref HEAD "$$branch"; git reset --quiet; echo "git is on $$branch again"; fi
	git update-ref -d refs/exps/stash 2>/dev/null || true
	git reset --quiet -- .dvc/tmp/repro.dat 2>/dev/null || true
	rm -f .dvc/tmp/repro.dat
	@# Cut off within a line, or so that DVC refuses it. What else a cut takes away, DVC does again.
	for lock in dvc.lock corpora/dvc.lock gpu/dvc.lock; do \
	  if [ -e $$lock ] && [ "$$(git status --porcelain -- $$lock 2>&1)" ] && { [ "$$(tail -c 1 $$lock | wc -l)" -ne 1 ] || \
	    dvc stage list $${lock%lock}yaml 2>&1 | grep -q "dvc.lock' validation failed"; }; then \
	    git checkout --quiet -- $$lock 2>/dev/null || rm -f $$lock; fi; done
	find data reports gpu -name '.*.tmp' -prune -exec rm -rf {} + 2>/dev/null || true
	@git stash list | sed 's/^/set aside, by you or by a killed dvc exp run (git stash show, git stash pop): /'

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "dynaroute needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
