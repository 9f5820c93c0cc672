"""What the tests of reports share."""

from pathlib import Path

import pytest
from dwr_tree import write_tree


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: everything that the DWR reports read."""
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path)
    return tmp_path
