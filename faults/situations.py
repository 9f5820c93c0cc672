"""Full disks, outputs that may not be written, cut lock files, two pipelines at once, and a killed queue.

    python faults/situations.py --workspace .scratch/faults

A disk that is full is a small file system in memory, almost filled up; an output that may not be written lies on one
that is mounted read-only. Both need the right to mount: root's, or that of `unshare --user --map-root-user --mount`,
which `make faults` uses where it is granted; where it is not, their rows say so.

Afterwards space is made, or the file system taken away, and `make recover && dvc repro` must give every file the bytes
that it had before, but for what is measured. Two cases are tried side by side. A campaign that was stopped goes on when
it is started again.

Writes  reports/reliability/situations.json
"""

import functools
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from workspace import (
    Row,
    Workspace,
    copy_of,
    durations,
    finished_workspace,
    mended,
    parse_arguments,
    run_campaign,
    with_log,
)

FORCED = ("--single-item", "--force")
OUTPUTS = {
    "train_dwr": "data/dwr/train",
    "export_experts": "data/dwr/expert_store",
    "encode_windows": "data/dagformer/embeddings/training",
    "train_dagformer@P1": "data/dagformer/P1",
    "report_dwr": "reports/dwr.md",
}
TOGETHER = ("tokenize@docs", "train_dwr", "train_dagformer@J1")  # stages of which two are started at once
CUTS = 8  # lock files cut off at the end of a line
QUEUED = 2  # times that a queue is killed
CHANGE = ("-S", "variants.J1.tau_final=0.3")  # of the experiment in the queue


def main() -> None:
    """Makes the situations, and writes a row for each case."""
    arguments = parse_arguments(__doc__, seed=0)
    pristine = finished_workspace(arguments.workspace)
    situations = {
        "two pipelines at once": (two_pipelines, TOGETHER),
        "the output is read-only": (read_only_output, tuple(OUTPUTS)),
        "the disk is full": (full_disk, tuple(stage for stage in durations(pristine) if stage)),
        "dvc.lock is cut off at the end of a line": (cut_lock_file, tuple(f"number {n + 1}" for n in range(CUTS))),
        "a queue is killed": (killed_queue, tuple(f"number {n + 1}" for n in range(QUEUED))),
    }
    cases = {f"{what}, {which}": (what, which) for what, (_, whole) in situations.items() for which in whole}
    with tempfile.TemporaryDirectory() as folder:

        def try_case(case: str, draw: random.Random) -> list[Row]:
            what, which = cases[case]
            root = Path(folder) / case.replace("/", "_")
            root.mkdir()
            return [{"situation": what, "stage": which, **situations[what][0](pristine, root, which, draw)}]

        run_campaign("situations", arguments, list(cases), try_case, at_once=2)


@functools.cache
def refusal_to_mount() -> str | None:
    """Why this process may not mount, or None."""
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip().partition("\n")[0] or f"mount ended with status {done.returncode}"
        subprocess.run(["umount", "--lazy", place], check=True)
    return None


def not_tried(reason: str) -> Row:
    """What is written of a case that this machine does not allow."""
    return {"then": f"not tried: {reason}", "outcome": "not tried"}


@contextmanager
def mounted(place: Path, *options: str) -> Iterator[None]:
    """A file system in memory at a folder, for as long as the block runs."""
    subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def said(done: subprocess.CompletedProcess, words: str) -> str:
    """Whether a command failed, and with a line that says why."""
    if not done.returncode:
        return "was not hindered"
    lines = (done.stdout + done.stderr).splitlines()
    if any(line.startswith("Traceback") for line in lines):
        return "failed with a traceback"
    return "failed and said why" if any(words in line for line in lines) else with_log("failed", "\n".join(lines))


def full_disk(pristine: Workspace, root: Path, stage: str, draw: random.Random) -> Row:
    """A stage with room for a part of its outputs."""
    if reason := refusal_to_mount():
        return not_tried(reason)
    size = sum(path.stat().st_size for path in pristine.root.rglob("*") if path.is_file())
    with mounted(root, "-o", f"size={2 * size + 2**24}"), copy_of(pristine, root / "workspace") as workspace:
        filler, before = root / "filler", os.statvfs(root).f_bavail
        for out in workspace.lock()[stage.rpartition(":")[2]]["outs"]:  # DVC would remove them, and so make room
            path = workspace.root / out["path"]
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        state = os.statvfs(root)
        room = draw.randrange((state.f_bavail - before) * state.f_frsize)  # part of what is needed
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize - room)
        ended = workspace.run("dvc", "repro", *FORCED, stage, check=False)
        filler.unlink()
        return {
            "room": room,
            "then": said(ended, "No space left"),
            "outcome": mended(workspace, pristine, "dvc", "repro"),
        }


def read_only_output(pristine: Workspace, root: Path, stage: str, draw: random.Random) -> Row:
    """A stage whose output, or the folder around it, is on a file system that is mounted read-only."""
    if reason := refusal_to_mount():
        return not_tried(reason)
    with copy_of(pristine, root / "workspace") as workspace:
        place = (workspace.root / OUTPUTS[stage]).parent
        shutil.copytree(place, root / "kept")
        with mounted(place):
            shutil.copytree(root / "kept", place, dirs_exist_ok=True)
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            ended = workspace.run("dvc", "repro", *FORCED, stage, check=False)
        return {"then": said(ended, "ead-only"), "outcome": mended(workspace, pristine, "dvc", "repro")}


def cut_lock_file(pristine: Workspace, root: Path, which: str, draw: random.Random) -> Row:
    """A dvc.lock that ends with a whole line, so that only what it says can show that there was more."""
    with copy_of(pristine, root / "workspace") as workspace:
        path = workspace.root / "dvc.lock"
        lines = path.read_text("utf-8").splitlines(keepends=True)
        kept = draw.randrange(1, len(lines))
        path.write_text("".join(lines[:kept]), "utf-8")
        workspace.run("make", "recover")
        same = len(path.read_text("utf-8").splitlines()) == kept
        then = "kept, since DVC can read it" if same else "taken from git, since DVC cannot read it"
        return {"lines": kept, "then": then, "outcome": mended(workspace, pristine, "dvc", "repro")}


def two_pipelines(pristine: Workspace, root: Path, stage: str, draw: random.Random) -> Row:
    """Two pipelines that run the same stage by force, the second a moment after the first."""
    with copy_of(pristine, root / "workspace") as workspace:
        processes = []
        for _ in range(2):
            processes.append(workspace.start("dvc", "repro", *FORCED, stage))
            time.sleep(draw.uniform(0, 3))
        failed = sum(bool(process.wait()) for process in processes)
        then = ("both ended well", "one ended well, one was refused", "both failed")[failed]
        return {"then": then, "outcome": mended(workspace, pristine, "dvc", "repro")}


def killed_queue(pristine: Workspace, root: Path, which: str, draw: random.Random) -> Row:
    """An experiment of a queue whose processes are all killed; it is queued again, and applied."""
    with (
        copy_of(pristine, root / "undisturbed") as undisturbed,
        copy_of(pristine, root / "workspace") as workspace,
    ):
        undisturbed.run("dvc", "exp", "run", *CHANGE)
        workspace.run("dvc", "exp", "run", "--queue", "--name", "first", *CHANGE)
        process = workspace.start("dvc", "exp", "run", "--run-all")
        moment = draw.uniform(5, 25)
        time.sleep(moment)
        kill_all_in(workspace.root)
        process.wait()
        workspace.run("make", "recover")
        # DVC takes what was killed for running, and `--run-all` would wait for it for ever.
        workspace.run("dvc", "queue", "kill", "--force", "first", check=False)
        again = workspace.run("dvc", "exp", "run", "--queue", "--name", "again", *CHANGE, check=False)
        ended = workspace.run("dvc", "exp", "run", "--run-all", check=False)
        applied = workspace.run("dvc", "exp", "apply", "again", check=False)
        row: Row = {"seconds": moment}
        for what, done in (("queued again", again), ("run again", ended), ("applied", applied)):
            if done.returncode:
                return row | {
                    "then": f"could not be {what}",
                    "outcome": with_log("failed", done.stdout + done.stderr),
                }
        return row | {"then": "queued again and run", "outcome": mended(workspace, undisturbed, "dvc", "repro")}


def kill_all_in(root: Path) -> None:
    """SIGKILL to every process that works in a folder: the worker of a queue is in no process group of ours."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(root) and process.pid != os.getpid():
                process.kill()


if __name__ == "__main__":
    main()
