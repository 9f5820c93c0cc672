"""Full disks, outputs that may not be written, two pipelines at once, and a killed queue, on the tiny pipeline.

    python faults/situations.py --workspace .scratch/faults

A disk that is full is a small file system in memory, almost filled up; an output that may not be written lies on one
that is mounted read-only. Both need the right to mount: root's, or that of `unshare --user --map-root-user --mount`.
Afterwards space is made, or the file system taken away, and `make recover && dvc repro` must give every file the bytes
that it had before, but for what is measured.

A campaign that was stopped goes on; remove its output to begin anew.

Writes  reports/reliability/situations.json
"""

import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from kills import FORCED, contents
from tqdm import tqdm
from workspace import REPOSITORY, Workspace, durations, finished_workspace, parse_arguments

from dynaroute.artifacts import read_json, write_json

OUTPUT = REPOSITORY / "reports/reliability/situations.json"
TOGETHER = 3  # times that two pipelines are started at once
QUEUED = 2  # times that a queue is killed
OUTPUTS = {
    "train_dwr": "data/dwr/train",
    "export_experts": "data/dwr/expert_store",
    "encode_windows": "data/dagformer/embeddings/training",
    "train_dagformer@P1": "data/dagformer/P1",
    "report_dwr": "reports/dwr.md",
}


def main() -> None:
    """Makes the situations, and writes a row for each case."""
    arguments = parse_arguments(__doc__, seed=0)
    pristine, draw = finished_workspace(arguments.workspace), random.Random(arguments.seed)
    rows: list[dict[str, Any]] = read_json(OUTPUT)["rows"] if OUTPUT.exists() else []
    done = {(row["situation"], row["stage"]) for row in rows}
    expected = contents(pristine.root)
    with tempfile.TemporaryDirectory() as folder:
        parts = (pipelines_at_once, read_only_outputs, full_disks, killed_queues)
        for part in parts:
            for row in tqdm(part(pristine, Path(folder) / part.__name__, expected, draw, done), desc=part.__name__):
                rows.append(row)
                write_json(OUTPUT, {"rows": rows})


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A file system in memory at a folder, for as long as the block runs."""
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def kill_all_in(root: Path) -> None:
    """SIGKILL to every process that works in a folder: the worker of a queue is in no process group of ours."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(root) and process.pid != os.getpid():
                process.kill()


def mended(workspace: Workspace, expected: dict[str, str], *command: str) -> str:
    """What `make recover` and a pipeline to its end give."""
    workspace.run("make", "recover")
    done = workspace.run(*(command or ("dvc", "repro")), check=False)
    if done.returncode:
        return "failed: " + " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
    found = contents(workspace.root)
    differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
    return f"differs: {', '.join(differing[:5])}" if differing else "the same bytes"


def said(done: subprocess.CompletedProcess, words: str) -> str:
    """Whether a command failed, and with a line that says why."""
    if not done.returncode:
        return "was not hindered"
    lines = (done.stdout + done.stderr).splitlines()
    if any(line.startswith("Traceback") for line in lines):
        return "failed with a traceback"
    return "failed and said why" if any(words in line for line in lines) else "failed: " + " / ".join(lines[-3:])


def full_disks(
    pristine: Workspace, root: Path, expected: dict[str, str], draw: random.Random, done: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Every stage once, with room for a part of its outputs."""
    size = sum(path.stat().st_size for path in pristine.root.rglob("*") if path.is_file())
    for stage in durations(pristine):
        if ("the disk is full", stage) in done:
            continue
        root.mkdir(exist_ok=True)
        with mounted(root, "-o", f"size={2 * size + 2**24}"):
            workspace = finished_workspace(pristine.copy(root / "workspace").root)
            filler, before = root / "filler", os.statvfs(root).f_bavail
            for out in workspace.lock()[stage]["outs"]:  # DVC would remove them, and so make room
                path = workspace.root / out["path"]
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            state = os.statvfs(root)
            room = draw.randrange((state.f_bavail - before) * state.f_frsize)  # part of what is needed
            with filler.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - room)
            ended = workspace.run("dvc", "repro", *FORCED, stage, check=False)
            filler.unlink()
            row = {"situation": "the disk is full", "stage": stage, "room": room}
            yield row | {"then": said(ended, "No space left"), "outcome": mended(workspace, expected)}


def read_only_outputs(
    pristine: Workspace, root: Path, expected: dict[str, str], draw: random.Random, done: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """A stage whose output, or the folder around it, is on a file system that is mounted read-only."""
    for stage, output in OUTPUTS.items():
        if ("the output is read-only", stage) in done:
            continue
        workspace = finished_workspace(pristine.copy(root).root)
        place = (root / output).parent
        kept = root.with_name("kept")
        shutil.copytree(place, kept)
        with mounted(place):
            shutil.copytree(kept, place, dirs_exist_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            ended = workspace.run("dvc", "repro", *FORCED, stage, check=False)
        row = {"situation": "the output is read-only", "stage": stage}
        yield row | {"then": said(ended, "ead-only"), "outcome": mended(workspace, expected)}
        shutil.rmtree(root)
        shutil.rmtree(kept)


def pipelines_at_once(
    pristine: Workspace, root: Path, expected: dict[str, str], draw: random.Random, done: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """Two pipelines that run the same stage by force, the second a moment after the first."""
    stages = list(durations(pristine))
    for stage in draw.sample(stages, TOGETHER):
        if ("two pipelines at once", stage) in done:
            continue
        workspace = finished_workspace(pristine.copy(root).root)
        processes = []
        for _ in range(2):
            processes.append(workspace.start("dvc", "repro", *FORCED, stage))
            time.sleep(draw.uniform(0, 3))
        statuses = sorted(process.wait() for process in processes)
        then = {0: "both ended well", 1: "one ended well, one was refused"}.get(sum(map(bool, statuses)), "both failed")
        row = {"situation": "two pipelines at once", "stage": stage}
        yield row | {"then": then, "outcome": mended(workspace, expected)}
        shutil.rmtree(root)


def killed_queues(
    pristine: Workspace, root: Path, expected: dict[str, str], draw: random.Random, done: set[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
    """An experiment of a queue whose processes are all killed; it is queued again, and applied."""
    for number in range(QUEUED):
        if ("a queue is killed", f"number {number + 1}") in done:
            continue
        workspace = finished_workspace(pristine.copy(root).root)
        changed = (
            "dvc",
            "exp",
            "run",
            "--queue",
            "--name",
            "first",
            "-S",
            f"dwr.training.epochs={0.06 + number / 100}",
        )
        workspace.run(*changed)
        process = workspace.start("dvc", "exp", "run", "--run-all")
        moment = draw.uniform(5, 25)
        time.sleep(moment)
        kill_all_in(workspace.root)
        process.wait()
        workspace.run("make", "recover")
        again = workspace.run(*("again" if part == "first" else part for part in changed), check=False)
        ended = workspace.run("dvc", "exp", "run", "--run-all", check=False)
        row = {"situation": "a queue is killed", "stage": f"number {number + 1}", "seconds": moment}
        if again.returncode or ended.returncode:
            text = (again.stdout + again.stderr + ended.stdout + ended.stderr).strip()
            yield row | {"then": "failed", "outcome": "failed: " + " / ".join(text.splitlines()[-3:])}
        else:
            workspace.run("dvc", "exp", "apply", "again")
            undisturbed = finished_workspace(pristine.copy(root.with_name("undisturbed")).root)
            undisturbed.run("dvc", "exp", "run", *changed[-2:])
            want = contents(undisturbed.root)
            yield row | {"then": "queued again and run", "outcome": mended(workspace, want)}
            shutil.rmtree(undisturbed.root)
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
