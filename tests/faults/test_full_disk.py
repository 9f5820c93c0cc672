"""A stage that finds the disk full says so in one line, and with room again the pipeline ends with the same bytes."""

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished_run import contents, forget, stages

pytestmark = pytest.mark.faults


@pytest.fixture
def disk(finished, tmp_path: Path) -> Iterator[Path]:
    """A file system in memory with room for two copies of the run."""
    size = 2 * sum(path.stat().st_size for path in finished.root.rglob("*") if path.is_file()) + 2**24
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.parametrize("stage", stages())
def test_a_full_disk_is_named_and_with_room_the_bytes_are_the_same(finished, disk, stage):
    workspace, filler = finished.copy(disk / "repository"), disk / "filler"
    needed = sum(out["size"] for out in workspace.lock()[stage.rpartition(":")[2]]["outs"])
    forget(workspace, stage)
    free = os.statvfs(disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize - random.Random(stage).randrange(needed))
    ended = workspace.run("dvc", "repro", "--single-item", stage, check=False)
    said = (ended.stdout + ended.stderr).splitlines()
    assert ended.returncode
    assert not [line for line in said if line.startswith("Traceback")], said
    assert [line for line in said if "No space left" in line], said
    filler.unlink()
    workspace.run("make", "recover")
    workspace.run("dvc", "repro")
    assert contents(workspace) == contents(finished)
