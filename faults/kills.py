"""Kills stages of the tiny pipeline at random moments, and sees whether `make recover && dvc repro` mends it.

    python faults/kills.py --workspace .scratch/faults --kills 108

In a copy of a finished run, in turn for every stage, under `dvc repro` and then again under `dvc exp run`: the stage's
outputs and what dvc.lock says of it are removed; the pipeline is started and killed with SIGKILL, all processes or DVC
alone, at a moment drawn over the time that the stage takes (of four kills, one while DVC is at work before it); then
`make recover`; and the same once more. After that, `make recover` and the same command as it stands must give every
file the bytes that it had before, but for what is measured.

Two stages are tried side by side. A campaign that was stopped goes on when it is started again.

Writes  reports/reliability/kills.json
"""

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import psutil
from ruamel.yaml import YAML
from workspace import (
    Row,
    Workspace,
    copy_of,
    durations,
    finished_workspace,
    mended,
    parse_arguments,
    run_campaign,
)

CHAIN = 2  # kills before a run that may end
AT_ONCE = 2
COMMANDS = (("dvc", "repro"), ("dvc", "exp", "run"))


def main() -> None:
    """Kills, recovers, compares, and writes a row for each kill."""
    arguments = parse_arguments(__doc__, kills=108, seed=0)
    pristine = finished_workspace(arguments.workspace)
    stages = [stage for stage in durations(pristine) if stage]
    cases = {}
    for number in range(-(-arguments.kills // CHAIN)):
        again, place = divmod(number, len(stages))
        command = COMMANDS[again % len(COMMANDS)]
        cases[f"{stages[place]}, {' '.join(command)}, {again // len(COMMANDS)}"] = stages[place], command
    with tempfile.TemporaryDirectory() as folder:

        def try_case(case: str, draw: random.Random) -> list[Row]:
            root = Path(folder) / case.replace("/", "_")
            return kill_and_mend(pristine, root, *cases[case], draw)

        run_campaign("kills", arguments, list(cases), try_case, AT_ONCE)


def kill_and_mend(
    pristine: Workspace, root: Path, stage: str, command: tuple[str, ...], draw: random.Random
) -> list[Row]:
    """Kills one stage CHAIN times; a row for each kill, all with what came of them."""
    seconds, rows = durations(pristine), []
    with copy_of(pristine, root) as workspace:
        forget(workspace, stage)
        while len(rows) < CHAIN:
            row = kill(workspace, command, stage, seconds, draw)
            if row["alive"]:
                rows.append({"stage": stage, "command": " ".join(command), **row})
            else:  # it came to its end; so it is quicker than it was
                seconds[stage] *= 0.7
                forget(workspace, stage)
            if len(rows) < CHAIN:
                workspace.run("make", "recover")
        outcome = mended(workspace, pristine, *command)
    return [row | {"outcome": outcome} for row in rows]


def forget(workspace: Workspace, stage: str) -> None:
    """Makes it as if a stage never ran: no outputs, no word of it in dvc.lock, nor in git."""
    file_name, _, name = stage.rpartition(":")
    lock = workspace.root / Path(file_name).parent / "dvc.lock"
    recorded = YAML(typ="safe").load(lock)
    for out in recorded["stages"].pop(name)["outs"]:
        workspace.run("rm", "-rf", out["path"])
    with lock.open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(recorded, file)
    workspace.commit(f"without {name}")


def kill(
    workspace: Workspace, command: tuple[str, ...], stage: str, seconds: dict[str, float], draw: random.Random
) -> Row:
    """Starts the pipeline and kills it at a random moment; whether it was alive then, and who was killed when."""
    alone, before = draw.random() < 0.5, draw.random() < 0.25
    moment = draw.uniform(0, seconds[""] if before else seconds[stage])
    said = workspace.root / ".scratch/said"
    process = workspace.start(*command, output=said)
    while not before and f"Running stage '{stage}'" not in said.read_text() and process.poll() is None:
        time.sleep(0.02)
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
