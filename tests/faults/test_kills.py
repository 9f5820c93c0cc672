"""Every stage, killed at random moments, resumes or starts again and ends with the same bytes."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
from finished_run import contents, forget, stages
from tiny_pipeline import Workspace

pytestmark = pytest.mark.faults

COMMANDS = (("dvc", "repro"), ("dvc", "exp", "run"))  # in turn
LONGEST = 6.0  # seconds from a stage's start to the kill; less for a stage that turns out to be quicker


def kill(workspace: Workspace, command: tuple[str, ...], stage: str, seconds: float, everything: bool) -> bool:
    """Kills the pipeline, or DVC alone, so long after a stage began; False if the pipeline had already ended."""
    said = workspace.root / ".scratch/said"
    said.parent.mkdir(exist_ok=True)
    workspace.environment["PYTHONUNBUFFERED"] = "1"
    process = workspace.start(*command, output=said)
    while f"Running stage '{stage}'" not in said.read_text() and process.poll() is None:
        time.sleep(0.02)
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    if process.poll() is not None:
        assert process.returncode == 0, said.read_text()
        return False
    if everything:
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()
    return True


@pytest.mark.parametrize(("number", "stage"), list(enumerate(stages())))
def test_a_stage_that_is_killed_twice_ends_with_the_same_bytes(finished, tmp_path: Path, number: int, stage: str):
    command, longest, draw = COMMANDS[number % 2], LONGEST, random.Random(stage)
    workspace = finished.copy(tmp_path / "repository")
    forget(workspace, stage)
    for everything in (True, False):
        while not kill(workspace, command, stage, draw.uniform(0, longest), everything):
            longest *= 0.7
            forget(workspace, stage)
        workspace.run("make", "recover")
    workspace.run(*command)
    assert contents(workspace) == contents(finished)
    assert workspace.hashes() == finished.hashes()
