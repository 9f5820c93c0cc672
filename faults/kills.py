"""Kills stages of the tiny pipeline at random moments, and sees whether `make recover && dvc repro` mends it.

    python faults/kills.py --kills 108

In a copy of the repository with a finished run, in turn for every stage: the stage is run again by force and killed at
a moment drawn over the time that it takes undisturbed, DVC's own work before and after it included, with SIGKILL to all
processes or to DVC alone; then `make recover`; and so twice more; then a plain `dvc repro` (or `dvc exp run`), after
which every file must have the bytes that it had before, but for what is measured.

Writes  reports/reliability/kills.json
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from repository import REPOSITORY
from tiny_pipeline import MEASURED, Workspace
from tqdm import tqdm

from dynaroute.artifacts import write_json

OUTPUT = REPOSITORY / "reports/reliability/kills.json"
CHAIN = 3  # kills before a repro that may end
COMMANDS = {"dvc repro": ["dvc", "repro"], "dvc exp run": ["dvc", "exp", "run"]}


def main() -> None:
    """Kills, recovers, compares, and writes a row for each kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=108)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace, durations = finished(Path(folder) / "workspace")
        write_json(OUTPUT, run(workspace, durations, arguments.kills, random.Random(arguments.seed)))


def finished(root: Path) -> tuple[Workspace, dict[str, float]]:
    """A workspace after its first run, and the seconds that each stage took, DVC's own included."""
    workspace = Workspace.create(root)
    workspace.environment.pop("PYTHONPATH", None)  # the copy's code
    started = time.monotonic()
    process = subprocess.Popen(
        ["dvc", "repro"], cwd=root, env=workspace.environment | {"PYTHONUNBUFFERED": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    starts, startup = {}, None
    for line in process.stdout:
        if line.startswith("Running stage"):
            starts[line.split("'")[1]] = time.monotonic()
            startup = startup or time.monotonic() - started
    if process.wait():
        raise SystemExit("the undisturbed run failed")
    workspace.commit("results")
    ends = [*list(starts.values())[1:], time.monotonic()]
    return workspace, {name: startup + end - start for (name, start), end in zip(starts.items(), ends, strict=True)}


def contents(root: Path) -> dict[str, str]:
    """The hash of every file that must repeat."""
    files = [path for part in ("data", "reports") for path in (root / part).rglob("*") if path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in files}
    return {
        name: hashlib.md5(path.read_bytes()).hexdigest()
        for name, path in names.items()
        if not any(word in name for word in MEASURED)
    }


def run(workspace: Workspace, durations: dict[str, float], kills: int, draw: random.Random) -> dict[str, Any]:
    """Kills until there are enough; a workspace that was not mended is replaced by a copy of the finished one."""
    root, pristine = workspace.root, workspace.root.with_name("pristine")
    shutil.copytree(root, pristine, symlinks=True)
    expected, locked = contents(root), workspace.hashes()
    rows: list[dict[str, Any]] = []
    with tqdm(total=kills, desc="kills", unit="kill") as progress:
        while len(rows) < kills:
            number = len(rows) // CHAIN
            stage = list(durations)[number % len(durations)]
            name = list(COMMANDS)[number % 4 == 3]
            chain = []
            while len(chain) < CHAIN:
                row = {
                    "stage": stage,
                    "command": name,
                    **kill(workspace, COMMANDS[name], stage, durations[stage], draw),
                }
                workspace.run("make", "recover")
                if row["alive"]:
                    chain.append(row)
            done = workspace.run(*COMMANDS[name], "--no-run-cache", check=False)
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
                shutil.copytree(pristine, root, symlinks=True)
            write_json(OUTPUT, {"rows": rows})
    return {"rows": rows}


def kill(workspace: Workspace, command: list[str], stage: str, seconds: float, draw: random.Random) -> dict[str, Any]:
    """Runs one stage by force, and kills it at a random moment; whether it was alive then, and who was killed when."""
    alone, moment = draw.random() < 0.5, draw.uniform(0.0, seconds)
    process = workspace.start(*command, "--single-item", "--force", "--no-run-cache", stage)
    deadline = time.monotonic() + moment
    while time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    alive = process.poll() is None
    below = psutil.Process(process.pid).children(recursive=True) if alive else []
    at_work = any("stages/" in " ".join(child.cmdline()) for child in below if child.is_running())
    if alive and alone:
        process.kill()
    elif alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {"alive": alive, "killed": "DVC alone" if alone else "all", "stage_at_work": at_work, "seconds": moment}


if __name__ == "__main__":
    main()
