"""What all fault tests share. They are opt-in: `make faults`, or `pytest -m faults`."""

import pytest
from finished_run import finished_run
from tiny_pipeline import Workspace


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Workspace:
    """A finished run of the tiny pipeline; tests spoil a copy."""
    return finished_run(tmp_path_factory.mktemp("pristine") / "repository")
