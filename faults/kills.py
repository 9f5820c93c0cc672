"""Kills stages of the tiny pipeline at random moments, and sees whether `make recover && dvc repro` mends it.

    python faults/kills.py --workspace .scratch/faults --kills 108

In a copy of the repository with a finished run, in turn for every stage: the stage is run again by force and killed at
a moment drawn over the time that it takes undisturbed, DVC's own work before and after it included, with SIGKILL to all
processes or to DVC alone; then `make recover`; and so three times more; then it is run to its end, and after it a plain
`dvc repro` (or `dvc exp run`). Then every file must have the bytes that it had before, but for what is measured.

A campaign that was stopped goes on; remove its output to begin anew.

Writes  reports/reliability/kills.json
"""

import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm
from workspace import MEASURED, REPOSITORY, Workspace, durations, finished_workspace, parse_arguments

from dynaroute.artifacts import read_json, write_json

OUTPUT = REPOSITORY / "reports/reliability/kills.json"
CHAIN = 4  # kills before a repro that may end
FORCED = ("--single-item", "--force")
COMMANDS = {"dvc repro": ["dvc", "repro"], "dvc exp run": ["dvc", "exp", "run"]}


def main() -> None:
    """Kills, recovers, compares, and writes a row for each kill."""
    arguments = parse_arguments(__doc__, kills=108, seed=0)
    pristine = finished_workspace(arguments.workspace)
    with tempfile.TemporaryDirectory() as folder:
        run(pristine, Path(folder) / "workspace", arguments.kills, arguments.seed)


def contents(root: Path) -> dict[str, str]:
    """The hash of every file that must repeat."""
    files = [path for part in ("data", "reports") for path in (root / part).rglob("*") if path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {
        name: hashlib.md5(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not any(word in name for word in MEASURED)
    }


def run(pristine: Workspace, root: Path, kills: int, seed: int) -> None:
    """Kills until there are enough; a workspace that was not mended is replaced by a copy of the finished one."""
    expected, locked, seconds = contents(pristine.root), pristine.hashes(), durations(pristine)
    workspace = finished_workspace(pristine.copy(root).root)
    rows: list[dict[str, Any]] = read_json(OUTPUT)["rows"] if OUTPUT.exists() else []  # of a campaign that was stopped
    left = [number for number in range(-(-kills // CHAIN)) if number not in {row["chain"] for row in rows}]
    with tqdm(total=len(left) * CHAIN, desc="kills", unit="kill") as progress:
        for number in left:
            draw = random.Random(f"{seed}, {number}")
            stage = list(seconds)[number % len(seconds)]
            name = list(COMMANDS)[number % 4 == 3]
            chain = []
            while len(chain) < CHAIN:
                row = {
                    "chain": number,
                    "stage": stage,
                    "command": name,
                    **kill(workspace, COMMANDS[name], stage, seconds[stage], draw),
                }
                workspace.run("make", "recover")
                if row["alive"]:
                    chain.append(row)
            # By force, for DVC would take the killed stage's results from its cache; then all, as a user would.
            done = workspace.run(*COMMANDS[name], *FORCED, stage, check=False)
            if not done.returncode:
                done = workspace.run(*COMMANDS[name], check=False)
            outcome = "the same bytes"
            if done.returncode:
                outcome = "failed: " + " / ".join((done.stdout + done.stderr).strip().splitlines()[-4:])
            elif (found := contents(root)) != expected or workspace.hashes() != locked:
                differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
                outcome = f"differs: {', '.join(differing[:5]) or 'dvc.lock'}"
            rows += [row | {"outcome": outcome} for row in chain]
            progress.update(len(chain))
            if outcome != "the same bytes":
                progress.write(f"{stage}: {outcome}")
                shutil.rmtree(root)
                pristine.copy(root)
            write_json(OUTPUT, {"rows": rows})


def kill(workspace: Workspace, command: list[str], stage: str, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Runs one stage by force, and kills it at a random moment; whether it was alive then, and who was killed when."""
    alone, moment = draw.random() < 0.5, draw.uniform(0.0, seconds)
    process = workspace.start(*command, *FORCED, stage)
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    alive = process.poll() is None
    at_work = alive and _stage_runs_below(process.pid)
    if alive and alone:
        process.kill()
    elif alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {"alive": alive, "killed": "DVC alone" if alone else "all", "stage_at_work": at_work, "seconds": moment}


def _stage_runs_below(process: int) -> bool:
    try:
        below = psutil.Process(process).children(recursive=True)
        return any("stages/" in " ".join(child.cmdline()) for child in below)
    except psutil.NoSuchProcess:
        return False


if __name__ == "__main__":
    main()
