"""What the tests of reports share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def tree(finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: what the tiny pipeline leaves, to be changed."""
    for name in ("data", "reports"):
        shutil.copytree(finished.root / name, tmp_path / name, copy_function=shutil.copyfile)
    shutil.copyfile(finished.root / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path
