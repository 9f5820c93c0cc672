"""What several test modules share."""

import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from repository import SHARED_DATA
from tiny_pipeline import Workspace

# The models here are tiny: more threads only wait for one another, which on a busy machine takes ten times as long.
# Set before torch is imported, and inherited by every process that a test starts. Stages set `num_threads` themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No time limit: on a busy machine any test may take long.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


# The files that take longest come first, so that workers end together. While one worker makes the finished run for the
# first of them, others have files that do without.
FIRST = ["test_results", "test_launchers", "test_two_processes", "test_hub", "test_gpu", "test_recover"]
FIRST += ["test_reruns", "test_interruptions", "test_clones"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST))


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Workspace:
    """The tiny pipeline after its first `dvc repro`, made once for all workers. Tests that change it work on a copy."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    made = root.with_suffix(".made")
    with root.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            workspace = Workspace.create(root)
            workspace.run("dvc", "repro")
            workspace.commit("results")
            made.touch()
    return Workspace(root)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What a stage sets lasts as long as its process, which here goes on with the next test."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def shared_data() -> Path:
    """Real text and the GPT-2 tokenizer files, which are kept outside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the data in {SHARED_DATA}, which is not part of the repository")
    return SHARED_DATA
