#!/bin/sh
# `make recover`: repairs what a killed stage, `dvc repro` or `dvc exp run` can leave. Run from the repository's root.

# A stage that outlived its DVC still writes: nothing may be repaired under it.
for lock in .scratch/running_*/lock; do
  if [ -s "$lock" ] && command -v flock >/dev/null && ! flock --timeout 60 "$lock" true; then
    echo "$lock: process $(cat "$lock") is at work: wait for it, or stop it"
    exit 1
  fi
done

# DVC itself works before and after each stage: it hashes results for minutes, and what it needs to record them must stay.
python - <<'EOF' || exit 1
import contextlib
import sys
from pathlib import Path

import psutil

root = Path.cwd()
for process in psutil.process_iter():
    with contextlib.suppress(psutil.Error):  # gone, or of somebody else
        command, folder = process.cmdline(), Path(process.cwd())
        repository = next((path for path in (folder, *folder.parents) if (path / ".dvc").is_dir()), None)
        # The worker of a queue works in copies of its own.
        is_dvc = "dvc" in [Path(word).name for word in command[:2]] or command[1:3] == ["-m", "dvc"]
        if is_dvc and repository == root and "queue-worker" not in command:
            sys.exit(f"process {process.pid} is at work: {' '.join(command)}: wait for it, or stop it")
EOF
if [ -e .dvc/tmp/lock ] && command -v flock >/dev/null && ! flock --nonblock .dvc/tmp/lock true; then
  echo ".dvc/tmp/lock: process $(echo $(cat .dvc/tmp/lock)), on another machine, is at work: wait for it, or stop it"
  exit 1
fi

rm -f "$(git rev-parse --git-path index.lock 2>/dev/null)" .dvc/tmp/rwlock .dvc/tmp/lock

# A killed `dvc exp run` leaves git without a branch, and its own experiment for the next one to run as well.
if ! git symbolic-ref --quiet HEAD >/dev/null; then
  branch=$(git rev-parse --symbolic-full-name '@{-1}' 2>/dev/null)
  tip=$(git rev-parse --quiet --verify "$branch")
  began=$(git rev-parse --quiet --verify refs/exps/exec/EXEC_BASELINE)
  if [ "$tip" ] && { [ "$tip" = "$(git rev-parse HEAD)" ] || [ "$tip" = "$began" ]; }; then
    git symbolic-ref HEAD "$branch"
    git reset --quiet
    echo "git is on $branch again"
  fi
fi
git update-ref -d refs/exps/stash 2>/dev/null
git reset --quiet -- .dvc/tmp/repro.dat 2>/dev/null
rm -f .dvc/tmp/repro.dat

# A lock file cut within a line, or refused by DVC, is replaced by git's. Stages missing from any other run again.
for lock in dvc.lock stages/data/dvc.lock; do
  if [ -e $lock ] && [ "$(git status --porcelain -- $lock 2>&1)" ] && {
    [ "$(tail -c 1 $lock | wc -l)" -ne 1 ] || dvc stage list ${lock%lock}yaml 2>&1 | grep -q "dvc.lock' validation failed"
  }; then
    git checkout --quiet -- $lock 2>/dev/null || rm -f $lock
  fi
done

find data reports -name '.*.tmp' -prune -exec rm -rf {} + 2>/dev/null
git stash list | sed 's/^/set aside, by you or by a killed dvc exp run (git stash show, git stash pop): /'
